// Entering and leaving a call of a small batch: what ranks compare has come without a signal, and
// nobody waits for peers at the end. What larger calls do: kernels/link.cuh.
//
// Where the link maps, the kernel *ends silently*: the host learns that the call has begun, and, if
// it waits for long, that it waits (kernels/mark.h), but not that it has ended.
//
// Memory order: a TaggedWord says by its epoch that it has come, and orders nothing else.
#pragma once

#include "kernels/device.cuh"
#include "kernels/link.cuh"

namespace epcomm {

/// Waits for a word of source that carries the epoch. By a warp; lanes that need none pass null.
/// Returns what the lane's word says. lost: set in all lanes if it was given up. looked: word is
/// what it was some time ago.
__device__ __forceinline__ uint32_t wait_tagged(const LinkArgs& link, int source,
                                                const uint64_t* tagged, uint64_t epoch, bool& lost,
                                                uint64_t word = 0, bool looked = false) {
  uint64_t begin = 0;
  for (int spin = 1;; ++spin, looked = false) {
    if (!looked && tagged != nullptr) word = load_relaxed_system(tagged);
    if (__all_sync(kFullWarp, tagged == nullptr || TaggedWord::is_of(word, epoch))) {
      if (begin != 0 && lane_index() == 0 && link.statistics.max_wait_ns != nullptr)
        note_wait(link.statistics, source, global_time_ns() - begin);
      return static_cast<uint32_t>(word);
    }
    if (begin == 0) begin = global_time_ns();
    if (spin % kSpinsPerLook == 0 && __any_sync(kFullWarp, gives_up(link, epoch, begin))) {
      lost = true;
      return 0;
    }
  }
}

/// What a lane has waited for, and whether the warp has given up.
struct LateWord {
  uint32_t value;
  bool lost;
};
/// As wait_tagged, for words that have been looked for before.
EPCOMM_SELDOM inline __device__ LateWord wait_tagged_late(const LinkArgs& link, int source,
                                                          const uint64_t* tagged, uint64_t epoch) {
  LateWord late{0, false};
  late.value = wait_tagged(link, source, tagged, epoch, late.lost);
  return late;
}

/// The lane's word of what source has announced briefly, in this rank's window; null = none.
__device__ __forceinline__ const uint64_t* brief_word(const LinkArgs& link, uint64_t epoch,
                                                      int source) {
  return lane_index() < LinkBrief::kWords
             ? reinterpret_cast<const uint64_t*>(link.window[link.rank] +
                                                 link.control.brief(source, epoch)) +
                   lane_index()
             : nullptr;
}
/// What the source that link_agree_briefly has the warp look at first has announced, asked for
/// ahead.
struct BriefAhead {
  uint64_t word = 0;
  bool asked = false;

  __device__ __forceinline__ void ask(const LinkArgs& link, uint64_t epoch) {
    const int s = warp_index();
    const uint64_t* tagged = s < link.num_ranks ? brief_word(link, epoch, s) : nullptr;
    load_relaxed_system_if(tagged != nullptr, word, tagged);
    asked = true;
  }
};
/// Whether what the lane's word says ends the call, or may do.
__device__ __forceinline__ bool is_doubtful(const LinkArgs& link, uint32_t value) {
  const int lane = lane_index();
  return lane < LinkBrief::kNumTokens ? value != static_cast<uint32_t>(link.entry.signature[lane])
                                      : lane == LinkBrief::kTroubled && value != 0;
}
/// Whether source has entered the call, and wants something else or is in trouble: then it may not
/// send what this rank waits for. By a warp.
__device__ __forceinline__ bool link_is_doubtful(const LinkArgs& link, uint64_t epoch, int source) {
  const uint64_t* tagged = brief_word(link, epoch, source);
  const uint64_t word = tagged != nullptr ? load_relaxed_system(tagged) : 0;
  const bool come = tagged == nullptr || TaggedWord::is_of(word, epoch);
  return __all_sync(kFullWarp, come) &&
         __any_sync(kFullWarp, tagged != nullptr && is_doubtful(link, static_cast<uint32_t>(word)));
}

/// Tokens of source, if what it has announced briefly has come, else `most`; the same in all lanes
/// of a warp. Of a source in another call they mean nothing.
__device__ __forceinline__ int announced_tokens(const LinkArgs& link, uint64_t epoch, int source,
                                                int most) {
  const auto* words =
      reinterpret_cast<const uint64_t*>(link.window[link.rank] + link.control.brief(source, epoch));
  const uint64_t word = load_relaxed_system(words + LinkBrief::kNumTokens);
  const int tokens = TaggedWord::is_of(word, epoch) ? min(static_cast<int32_t>(word), most) : most;
  return __shfl_sync(kFullWarp, tokens, 0);
}

/// The end of link_agree_briefly where something is the matter. lost: some warp has given up a
/// wait.
template <class Link>
EPCOMM_SELDOM __device__ bool link_settle_doubt(const LinkArgs& link, LinkCall& call, bool tells,
                                                bool lost) {
  if (!lost) {
    // The whole entries say what is the matter.
    return link_agree<Link>(link, call, tells);
  }
  if (thread_index() == 0) {
    call.bad = LinkCall::kLost;
    atomicExch(&link.state->lost, 1u);
  }
  __syncthreads();
  return false;
}

/// As link_agree, where what is compared has come with the brief entries: by every block of a
/// kernel for small batches. Fills num_tokens of call.entry only, where all is well. lost: the warp
/// has given up a wait before, which ends the call.
template <class Link>
__device__ __forceinline__ bool link_agree_briefly(const LinkArgs& link, LinkCall& call, bool tells,
                                                   bool lost = false,
                                                   const BriefAhead& ahead = {}) {
  if constexpr (!Link::kMapped) return link_agree<Link>(link, call, tells);
  bool doubtful = false;
  const int lane = lane_index(), warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int s = warp_index(); s < link.num_ranks && !lost; s += warps) {
    const uint64_t* word = brief_word(link, call.epoch, s);
    const uint32_t value =
        wait_tagged(link, s, word, call.epoch, lost, ahead.word, ahead.asked && s == warp_index());
    if (lane == LinkBrief::kNumTokens) call.entry[s].num_tokens = static_cast<int32_t>(value);
    doubtful |= is_doubtful(link, value);
  }
  if (__syncthreads_or(lost || doubtful) == 0) {
    if (thread_index() == 0 && link.token != 0 && tells)
      store_release_system(&link.report->entered, link.token);
    return true;
  }
  return link_settle_doubt<Link>(link, call, tells, __syncthreads_or(lost) != 0);
}

/// As link_begin. ends: this kernel ends the call. Where the link maps, it does not find out then
/// which of its blocks is the last, which takes a trip to memory, nor tell the host, a store that
/// has to arrive before the kernel has ended: the block that begins last closes the call when it
/// ends, for all others have read by then what it writes.
template <class Link>
__device__ __forceinline__ bool link_begin_briefly(const LinkArgs& link, LinkCall& call,
                                                   const LinkStart& start, bool ends) {
  const bool going = link_begin(link, call, start);
  // Not by the first warps, which have more to do. Barriers follow.
  if (Link::kMapped && ends && thread_index() == static_cast<int>(blockDim.x) - 1)
    call.before = atomicAdd(&link.state->arrived, 1u);
  return going;
}

/// For peers that are in another call, one that waits for it.
template <class Link>
__device__ __forceinline__ void signal_done(const LinkArgs& link, const LinkCall& call) {
  fence_system();
  link_quiet<Link>(link);
  if (const int r = thread_index(); r < link.num_ranks)
    link_signal<Link>(link, r, own_inbox(link, offsetof(LinkInbox, done)), call.epoch);
}

/// As link_leave, where the link maps. receives: the block has asked whether all agree; leads: of
/// one such block of the grid.
__device__ __forceinline__ void link_leave_silently(const LinkArgs& link, LinkCall& call,
                                                    bool receives, bool leads, bool agreed,
                                                    bool completed) {
  const bool lost = __syncthreads_or(!completed || call.bad == LinkCall::kLost) != 0;
  if (thread_index() == 0) {
    LinkState& state = *link.state;
    if (lost) atomicExch(&state.lost, 1u);
    // Of a refused call nobody has read what was staged. Blocks that begin later must not take this
    // for what was before the call: it names the call.
    if (leads && !lost && call.clean != agreed)
      state.clean[call.epoch & 1] = agreed ? static_cast<uint32_t>(call.epoch) : 0;
    if (call.before + 1 == gridDim.x) {
      state.arrived = 0;
      state.blocks = call.blocks + gridDim.x;
      state.epoch = call.epoch;
      count_progress(link, call, 1);
    }
    if (receives && agreed) {
      atomicAdd(&state.left, 1u);  // nothing waits for what it returns
    } else {
      // Blocks that only send do not know whether the call was refused; they end before others.
      if (!agreed && !lost) state.refused = call.epoch;
      if (!agreed) fence_system();
      if (atomicAdd(&state.left, 1u) + 1 - call.blocks == gridDim.x) {
        fence_system();
        call.last = load_relaxed_system(&state.refused) == call.epoch;
      }
    }
  }
  if (lost || (receives && agreed)) return;
  __syncthreads();
  if (call.last != 0) signal_done<PeerLink>(link, call);
}

/// Ends a call without waiting for peers: by every block, all threads, of a link that puts. agreed:
/// of link_agree, or true of a block that did not ask. If a block says false, `done` is signalled
/// all the same, for peers that disagree and are in a call that waits for it. completed: this
/// thread has given up no wait since. What a block has to say of itself goes with its arrival: the
/// last has nothing to ask then. sent: this block may have put something; others have nothing that
/// the last one's quiet is to cover.
template <class Link>
__device__ __forceinline__ void link_leave(const LinkArgs& link, LinkCall& call, bool agreed,
                                           bool completed, bool sent) {
  static_assert(!Link::kMapped);
  constexpr uint32_t kLostBlock = 1 << 10, kRefusingBlock = 1 << 20;  // there are fewer SMs
  const bool lost = __syncthreads_or(!completed || call.bad == LinkCall::kLost) != 0;
  const int r = thread_index();
  if (r == 0) {
    const uint32_t own = 1 + (lost ? kLostBlock : 0) + (agreed ? 0 : kRefusingBlock);
    if (sent || !agreed) fence_system();
    const uint32_t arrived = atomicAdd(&link.state->arrived, own) + own;
    call.last = arrived % kLostBlock == gridDim.x;
    if (call.last != 0) {
      link.state->arrived = 0;
      call.bad = arrived % kRefusingBlock >= kLostBlock ? LinkCall::kLost
                 : arrived >= kRefusingBlock            ? LinkCall::kRefused
                                                        : 0;
      fence_system();  // acquires what the blocks have put that came before
      if (call.bad == 0) {
        Link::quiet(link);
        link_close(link, call);
      }
    }
  }
  __syncthreads();
  if (call.last == 0 || call.bad == LinkCall::kLost) return;  // lost: the host is to notice
  if (call.bad == 0) return;
  signal_done<Link>(link, call);
  link_quiet<Link>(link);
  if (r == 0) link_close(link, call);
}

}  // namespace epcomm
