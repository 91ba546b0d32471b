// Entering and leaving a collective call, by the blocks of the kernel that moves its rows.
//
// Memory order: an entry is released by the `entered` signal and acquired by each block that waits
// for it. Rows are released by `done`: every block completes its stores, then fences at system
// scope and arrives; the last block signals after it has seen all arrive. Whoever waits for `done`
// acquires at system scope; kernels after it on the stream see the rows.
//
// A link is a type with the verbs by which a kernel reaches its peers' windows. PeerLink, below,
// is that of GPUs that load and store each other's memory (kMapped): what a peer shall read is
// stored into its window, and the verb signal() releases it. NvshmemLink (kernels/link_nvshmem.cuh)
// puts instead: what a peer shall read is stored into this rank's own window, at the place that it
// will have in the peer's (which belongs to this rank as a source, in both), and put from there.
//
//   kMapped                          which of the two
//   reached(word, epoch)             is this word of the own window at least epoch? Acquires.
//   signal(link, peer, word, epoch)  sets the word at an offset of a peer's window
// and where kMapped is false, by a whole warp, after a fence at system scope that covers what is
// put:
//   put_signal(link, peer, piece, word, epoch)    copies from here to the peer, then signal(), some
//                                    time: in no order with anything else
// and by one thread:
//   quiet(link)                      until all that this rank has put and signalled has landed, so
//                                    that what it was put from may be used again
#pragma once

#include <cstddef>

#include "epcomm/error.h"
#include "kernels/device.cuh"
#include "kernels/link.h"
#include "kernels/mark.h"
#include "kernels/rows.cuh"
#include "kernels/statistics.cuh"

namespace epcomm {

constexpr int kSpinsPerLook = 256;  ///< polls of a signal between looks at the clock and the host
constexpr uint64_t kTellWaitNs = 1'000'000;  ///< after which a wait is told to the host

/// What a block knows of the call, in shared memory.
struct LinkCall {
  static constexpr int32_t kRefused = 1, kLost = 2;
  uint64_t epoch;
  int32_t block;      ///< number of this block
  uint64_t marks[2];  ///< LinkState::marks when the kernel began
  LinkEntry entry[kMaxLinkRanks];
  uint32_t blocks;  ///< LinkState::blocks when the kernel began
  bool clean;       ///< LinkState::clean of before the call, whenever this block began
  uint32_t before;  ///< of link_begin_briefly: blocks of the grid that began before this one
  int32_t bad;      ///< not 0: no rows may be moved
  int32_t last;     ///< of link_finish: this block is the last of the grid

  /// Address here of what peer announced, by the offset in its entry.
  __device__ __forceinline__ char* at(const LinkArgs& link, int peer, uint64_t offset) const {
    return link.window[peer] + offset;
  }
};

__device__ __forceinline__ LinkInbox* inbox(const LinkArgs& link, int owner, int source) {
  return reinterpret_cast<LinkInbox*>(link.window[owner] + link.control.inbox(source));
}

/// GPUs that load and store each other's memory.
struct PeerLink {
  static constexpr bool kMapped = true;

  static __device__ __forceinline__ bool reached(const uint64_t* word, uint64_t epoch) {
    return load_acquire_system(word) >= epoch;
  }
  /// Releases what is ordered before it.
  static __device__ __forceinline__ void signal(const LinkArgs& link, int peer, size_t word,
                                                uint64_t epoch) {
    store_release_system(reinterpret_cast<uint64_t*>(link.window[peer] + word), epoch);
  }
};

/// Bytes of this rank's window, and where they go in a peer's.
struct LinkPiece {
  size_t from, to;
  uint32_t bytes;
};
/// A piece at the same place in both.
__device__ __forceinline__ LinkPiece same_place(size_t at, size_t bytes) {
  return {at, at, static_cast<uint32_t>(bytes)};
}

/// Offset of a word (offsetof in LinkInbox) of the inbox that this rank writes in every window.
__device__ __forceinline__ size_t own_inbox(const LinkArgs& link, size_t word) {
  return link.control.inbox(link.rank) + word;
}

/// As Link::signal, also for this rank itself.
template <class Link>
__device__ __forceinline__ void link_signal(const LinkArgs& link, int peer, size_t word,
                                            uint64_t epoch) {
  if (Link::kMapped || peer == link.rank)
    PeerLink::signal(link, peer, word, epoch);
  else
    Link::signal(link, peer, word, epoch);
}

/// A piece and the signal that it has landed, to a peer or to this rank itself; where the link
/// puts. By a warp.
template <class Link>
__device__ __forceinline__ void link_put_signal(const LinkArgs& link, int peer,
                                                const LinkPiece& piece, size_t word,
                                                uint64_t epoch) {
  if (peer != link.rank && piece.bytes != 0)
    Link::put_signal(link, peer, piece, word, epoch);
  else if (lane_index() == 0)
    link_signal<Link>(link, peer, word, epoch);
}

/// Of a wait in the call that has begun at `begin`, from time to time: whether it is to be given
/// up. The host is told that it lasts, and if it took too long: it may not know that the call has
/// not ended yet, or that it has ended so.
EPCOMM_SELDOM inline __device__ bool gives_up(const LinkArgs& link, uint64_t epoch,
                                              uint64_t begin) {
  const uint64_t waited = global_time_ns() - begin;
  const bool too_long = waited > link.timeout_ns;
  if (waited > kTellWaitNs)
    *static_cast<volatile uint64_t*>(&link.progress->waits) = wait_word(epoch, waited);
  if (too_long) *static_cast<volatile uint64_t*>(&link.progress->gave_up) = 1;
  return too_long || load_relaxed_system(&link.report->abort) != 0;
}

/// Waits for a signal of source. notes: the time counts in the statistics; of threads that wait for
/// the same, one should say so. False if it was given up: the host said so, or it took too long.
template <class Link = PeerLink>
__device__ __forceinline__ bool wait_signal(const LinkArgs& link, int source,
                                            const uint64_t* signal, uint64_t epoch,
                                            bool notes = true) {
  if (Link::reached(signal, epoch)) return true;
  const uint64_t begin = global_time_ns();
  for (int spin = 1; !Link::reached(signal, epoch); ++spin) {
    if (spin % kSpinsPerLook == 0 && gives_up(link, epoch, begin)) return false;
  }
  if (notes && link.statistics.max_wait_ns != nullptr)
    note_wait(link.statistics, source, global_time_ns() - begin);
  return true;
}

/// Counts one more call begun (0) or ended (1).
__device__ __forceinline__ uint64_t count_progress(const LinkArgs& link, const LinkCall& call,
                                                   int which) {
  const uint64_t count = call.marks[which] + 1;
  link.state->marks[which] = count;
  return count;
}
/// And tells the host. Its memory is written, not read: a kernel would wait for that about as long
/// as for a whole small batch.
__device__ __forceinline__ void mark_progress(const LinkArgs& link, const LinkCall& call, int which,
                                              uint64_t flags = 0) {
  const uint64_t count = count_progress(link, call, which);
  *static_cast<volatile uint64_t*>(which == 0 ? &link.progress->begun : &link.progress->ended) =
      count << 8 | flags | static_cast<uint64_t>(link.entry.signature[0]);
}

/// What of a rank's entry only its device knows: the fields of these names.
struct EntryNews {
  int32_t short_rows = 0, bad_index = 0, bad_value = 0;
};

/// Copies this rank's entry, with its news, and `words` 4-byte words of announce into the inbox
/// that it writes in the window of rank `owner`. By a warp.
template <class Link>
__device__ __forceinline__ void write_entry(const LinkArgs& link, uint64_t epoch, int owner,
                                            const int32_t* announce, int words,
                                            const EntryNews& news) {
  char* window = link.window[owner];
  const bool troubled = link.entry.needed_bytes != 0 || news.short_rows != 0 || news.bad_index != 0;
  if (const int i = lane_index(); Link::kMapped && i < LinkBrief::kWords) {
    const auto value = static_cast<uint32_t>(i < LinkBrief::kNumTokens    ? link.entry.signature[i]
                                             : i == LinkBrief::kNumTokens ? link.entry.num_tokens
                                                                          : int32_t{troubled});
    store_relaxed_system(
        reinterpret_cast<uint64_t*>(window + link.control.brief(link.rank, epoch)) + i,
        TaggedWord::of(epoch, value));
  }
  copy_words<uint4>(window + link.control.counts(link.rank, epoch),
                    reinterpret_cast<const char*>(announce), words * 4);
  copy_words<uint4>(window + link.control.entry(link.rank, epoch),
                    reinterpret_cast<const char*>(&link.entry), sizeof(LinkEntry));
  if (news.short_rows == 0 && news.bad_index == 0) return;
  __syncwarp();
  if (lane_index() != 0) return;
  auto& entry = *reinterpret_cast<LinkEntry*>(window + link.control.entry(link.rank, epoch));
  entry.short_rows = news.short_rows;
  entry.bad_index = news.bad_index;
  entry.bad_value = news.bad_value;
}

/// Block 0 announces: by warps, one peer each, the next rank first. behind: bytes that the block
/// has stored behind its entry, where the link puts. Ends without a barrier.
template <class Link = PeerLink>
__device__ __forceinline__ void link_announce(const LinkArgs& link, uint64_t epoch,
                                              const int32_t* announce, int words,
                                              const EntryNews& news = {},
                                              [[maybe_unused]] size_t behind = 0) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  if constexpr (!Link::kMapped) {
    if (warp_index() == 0) write_entry<Link>(link, epoch, link.rank, announce, words, news);
    __syncthreads();
    fence_system();  // what the block has stored is read by a network card
  }
  for (int i = warp_index(); i < link.num_ranks; i += warps) {
    const int peer = (link.rank + 1 + i) % link.num_ranks;
    if constexpr (!Link::kMapped) {
      // One message: nothing of it can be missing where its signal is.
      const size_t bytes = behind == 0
                               ? sizeof(LinkEntry)
                               : ControlLayout::kEntryBytes + align_up(behind, sizeof(uint4));
      link_put_signal<Link>(link, peer, same_place(link.control.entry(link.rank, epoch), bytes),
                            own_inbox(link, offsetof(LinkInbox, entered)), epoch);
    } else {
      write_entry<Link>(link, epoch, peer, announce, words, news);
      __syncwarp();
      // Releases what all lanes have written.
      if (lane_index() == 0)
        link_signal<Link>(link, peer, own_inbox(link, offsetof(LinkInbox, entered)), epoch);
    }
  }
}

/// All ranks refuse a call alike, for they compare the same entries. The host is told once.
__device__ __forceinline__ void report_refusal(const LinkArgs& link, const LinkCall& call) {
  if (link.report->refused != 0) return;
  for (int r = 0; r < link.num_ranks; ++r) link.report->entry[r] = call.entry[r];
  fence_system();  // the host takes the epoch as the sign that the entries are there
  *static_cast<volatile uint64_t*>(&link.report->refused) = call.epoch;
}

/// How the blocks of a kernel are numbered.
enum class BlockOrder {
  kIndex,    ///< blockIdx
  kStarted,  ///< as they start: those with lower numbers run already, or have ended
};

/// What a thread finds when a kernel begins. Its loads are on their way until epoch() or lost() is
/// called, so that a kernel may issue others first.
struct LinkStart {
  __device__ __forceinline__ explicit LinkStart(const LinkArgs& link)
      : last_(link.state->epoch), lost_(link.state->lost) {}
  __device__ __forceinline__ uint64_t epoch() const { return from_here_on(last_) + 1; }
  __device__ __forceinline__ bool lost() const { return from_here_on(lost_) != 0; }

 private:
  uint64_t last_, lost_;
};

/// Begins a call, or a phase of one: by every block, all threads. False: the link is lost. A thread
/// that finds it lost must not have sent anything. Ends with a barrier.
__device__ __forceinline__ bool link_begin(const LinkArgs& link, LinkCall& call,
                                           const LinkStart& start,
                                           BlockOrder order = BlockOrder::kIndex) {
  if (thread_index() == 0) {
    call.epoch = start.epoch();
    call.block = static_cast<int32_t>(
        order == BlockOrder::kIndex ? blockIdx.x : atomicAdd(&link.state->started, 1u));
    call.marks[0] = link.state->marks[0];  // came with the epoch
    call.marks[1] = link.state->marks[1];
    call.blocks = link.state->blocks;
    const uint32_t clean = link.state->clean[call.epoch & 1];
    call.clean = clean != 0 && clean != static_cast<uint32_t>(call.epoch);
    call.bad = 0;
    call.last = 0;
  }
  // Another block may have lost it just now, after some threads of this one have looked. No epoch
  // is 0: all threads have it behind the barrier, when other blocks may write the next.
  if (__syncthreads_or(start.lost() || start.epoch() == 0) == 0) return true;
  if (thread_index() == 0) call.bad = LinkCall::kLost;
  __syncthreads();
  return false;
}
__device__ __forceinline__ bool link_begin(const LinkArgs& link, LinkCall& call,
                                           BlockOrder order = BlockOrder::kIndex) {
  return link_begin(link, call, LinkStart(link), order);
}

/// Tells the host that a call has begun, before its first wait. silent: it will not tell its end.
/// By one thread of the grid.
__device__ __forceinline__ void link_mark_begun(const LinkArgs& link, const LinkCall& call,
                                                bool silent = false) {
  mark_progress(link, call, 0, silent ? kEndsSilently : 0);
}

/// Whether a rank's entry ends the call for all: it wants something else, cannot have it, or has no
/// room.
__device__ __forceinline__ bool refuses(const LinkArgs& link, const LinkEntry& entry) {
  bool refused = entry.needed_bytes != 0 || entry.short_rows != 0 || entry.bad_index != 0;
  for (int f = 0; f < LinkEntry::kSignatureWords; ++f)
    refused |= entry.signature[f] != link.entry.signature[f];
  return refused;
}

/// Waits for the entries of all ranks and compares them: by every block, all threads. Returns true
/// if all ranks want the same and have room; call holds their entries then, and what is behind them
/// has arrived. tells: the host learns what this block has found. Ends with a barrier.
template <class Link = PeerLink>
__device__ __forceinline__ bool link_agree(const LinkArgs& link, LinkCall& call, bool tells) {
  const int r = thread_index();
  bool lost = false, refused = false;
  if (r < link.num_ranks) {
    const LinkInbox* from = inbox(link, link.rank, r);
    lost = !wait_signal<Link>(link, r, &from->entered, call.epoch);
    if (!lost) {
      const LinkEntry& entry = call.entry[r] = *reinterpret_cast<const LinkEntry*>(
          link.window[link.rank] + link.control.entry(r, call.epoch));
      refused = refuses(link, entry);
    }
  }
  // One barrier where all is well: call.bad is still 0.
  if (__syncthreads_or(lost || refused)) {
    lost = __syncthreads_or(lost) != 0;
    if (r == 0) {
      call.bad = lost ? LinkCall::kLost : LinkCall::kRefused;
      if (lost) atomicExch(&link.state->lost, 1u);
      if (!lost && tells) report_refusal(link, call);
    }
    __syncthreads();
  }
  if (r == 0 && call.bad != LinkCall::kLost && link.token != 0 && tells)
    store_release_system(&link.report->entered, link.token);
  return call.bad == 0;
}

/// Begins a call: by every block of its first kernel, all threads. Block 0 announces. Returns true
/// if all ranks have entered, want the same and have room; call holds their entries then. False:
/// move nothing, go on to link_finish. short_rows: of the entry, by block 0. Ends with a barrier.
template <class Link = PeerLink>
__device__ __forceinline__ bool link_enter(const LinkArgs& link, LinkCall& call,
                                           const int32_t* announce = nullptr, int words = 0,
                                           int32_t short_rows = 0,
                                           BlockOrder order = BlockOrder::kIndex) {
  if (!link_begin(link, call, order)) return false;
  if (call.block == 0) {
    if (thread_index() == 0) link_mark_begun(link, call);
    link_announce<Link>(link, call.epoch, announce, words, {short_rows},
                        static_cast<size_t>(words) * sizeof(int32_t));
  }
  return link_agree<Link>(link, call, call.block == 0);
}

/// Tokens or rows that this rank receives and has no room for; for link_enter.
__device__ __forceinline__ int32_t missing_room(const GuessedRoom& room) {
  int32_t missing = 0;
  if (room.tokens != nullptr) missing = max(missing, *room.tokens - room.token_capacity);
  if (room.rows_end != nullptr) missing = max(missing, *room.rows_end - room.row_capacity);
  return missing;
}

/// A dispatch ahead of its counts: of a routing that all ranks have refused, which some of them may
/// have learned before they came here. Then nobody enters.
__device__ __forceinline__ bool has_no_routing(const LinkArgs& link, const GuessedRoom& room) {
  if (room.tokens == nullptr || link.state->route_refused == 0) return false;
  if (blockIdx.x == 0 && thread_index() == 0)
    store_release_system(&link.report->entered, link.token);
  return true;
}

/// The entries of received token n in the recv_topk_idx and recv_topk_weights that a rank has
/// announced, in its window; by a warp. Lane k < K has slot k of the token: the expert's number at
/// that rank, -1 = it is elsewhere, and the weight.
__device__ __forceinline__ void write_slots(char* window, const LinkEntry& there, int topk,
                                            int64_t n, int32_t local, float weight) {
  if (lane_index() >= topk) return;
  const int64_t entry = n * topk + lane_index();
  if (there.topk_idx != 0)
    store_index(window + there.topk_idx, static_cast<IndexType>(there.index_bytes), entry, local);
  if (there.topk_weights != 0)
    reinterpret_cast<float*>(window + there.topk_weights)[entry] =
        local >= 0 ? __fadd_rn(0.0f, weight) : 0.0f;
}

/// Goes on with a call that an earlier kernel on the stream has entered: by every block, all
/// threads. False: that kernel has given up, or the call was refused. Ends with a barrier.
__device__ __forceinline__ bool link_resume(const LinkArgs& link, LinkCall& call) {
  const int r = thread_index();
  if (!link_begin(link, call)) return false;
  bool refused = false;
  if (r < link.num_ranks) {
    const LinkEntry& entry = call.entry[r] = *reinterpret_cast<const LinkEntry*>(
        link.window[link.rank] + link.control.entry(r, call.epoch));
    refused = refuses(link, entry);
  }
  if (__syncthreads_or(refused) == 0) return true;
  if (r == 0) call.bad = LinkCall::kRefused;
  __syncthreads();
  return false;
}

/// Signals that what earlier kernels on the stream have stored into the peers' staging rows is
/// complete, and waits for the peers, which do the same. By every block, all threads. False: it was
/// given up. Ends with a barrier.
__device__ __forceinline__ bool link_pushed(const LinkArgs& link, LinkCall& call) {
  const int r = thread_index();
  bool lost = false;
  if (r < link.num_ranks) {
    if (blockIdx.x == 0) {
      fence_system();
      store_release_system(&inbox(link, r, link.rank)->pushed, call.epoch);
    }
    lost = !wait_signal(link, r, &inbox(link, link.rank, r)->pushed, call.epoch);
  }
  if (__syncthreads_or(lost) == 0) return true;
  if (r == 0) {
    call.bad = LinkCall::kLost;
    atomicExch(&link.state->lost, 1u);
  }
  __syncthreads();
  return false;
}

/// By every block of the last kernel of a call, all threads, when this block's stores are written.
/// True in one block: all others have come here before it, and that block may signal what all
/// blocks have stored. call.bad says there whether the link is lost.
__device__ __forceinline__ bool link_is_last(const LinkArgs& link, LinkCall& call) {
  __syncthreads();
  if (thread_index() == 0) {
    // Covers the stores of the whole block, which the barrier has ordered before.
    fence_system();
    call.last = atomicAdd(&link.state->arrived, 1u) + 1 == gridDim.x;
    fence_system();  // and acquires those of the blocks that came before
    if (call.last != 0) {
      link.state->arrived = link.state->started = link.state->pieces = 0;
      call.bad = atomicAdd(&link.state->lost, 0u) != 0 ? LinkCall::kLost : 0;
    }
  }
  __syncthreads();
  return call.last != 0;
}

/// Until what all blocks have put has landed; where the link puts. By all threads of the last block
/// of a call. Begins and ends with a barrier.
template <class Link>
__device__ __forceinline__ void link_quiet([[maybe_unused]] const LinkArgs& link) {
  if constexpr (!Link::kMapped) {
    __syncthreads();
    if (thread_index() == 0) Link::quiet(link);
    __syncthreads();
  }
}

/// The call is over on this rank. By one thread of the grid.
__device__ __forceinline__ void link_close(const LinkArgs& link, const LinkCall& call) {
  link.state->epoch = call.epoch;
  mark_progress(link, call, 1);
}

/// Ends a call: by every block of its last kernel, all threads, when this block's stores are
/// written. The last block signals, and waits for the peers. No thread needs what call holds
/// afterwards.
template <class Link = PeerLink>
__device__ __forceinline__ void link_finish(const LinkArgs& link, LinkCall& call) {
  if (!link_is_last(link, call)) return;
  const int r = thread_index();
  if (r < link.num_ranks) link.state->taken[r] = 0;
  if (call.bad != 0) return;  // not marked as ended: the host is to notice
  bool lost = false;
  link_quiet<Link>(link);
  if (r < link.num_ranks) {
    link_signal<Link>(link, (link.rank + r) % link.num_ranks,
                      own_inbox(link, offsetof(LinkInbox, done)), call.epoch);
    lost = !wait_signal<Link>(link, r, &inbox(link, link.rank, r)->done, call.epoch);
  }
  lost = __syncthreads_or(lost);
  if (r != 0) return;
  if constexpr (!Link::kMapped)
    if (!lost) Link::quiet(link);
  if (lost)
    atomicExch(&link.state->lost, 1u);
  else
    link_close(link, call);
}

}  // namespace epcomm
