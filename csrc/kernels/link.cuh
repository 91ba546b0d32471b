// Entering and leaving a collective call, by the blocks of the kernel that moves its rows.
//
// Memory order: an entry is released by the `entered` signal and acquired by each block that waits
// for it. Rows are released by `done`: every block completes its stores, then fences at system
// scope and arrives; the last block signals after it has seen all arrive. Whoever waits for `done`
// acquires at system scope; kernels after it on the stream see the rows.
#pragma once

#include "epcomm/error.h"
#include "kernels/device.cuh"
#include "kernels/link.h"
#include "kernels/rows.cuh"

namespace epcomm {

constexpr int kSpinsPerLook = 256;  ///< polls of a signal between looks at the clock and the host

/// What a block knows of the call, in shared memory.
struct LinkCall {
  uint64_t epoch;
  LinkEntry entry[kMaxLinkRanks];
  int32_t bad;   ///< not 0: no rows may be moved
  int32_t last;  ///< of link_finish: this block is the last of the grid

  /// Address here of what peer announced, by the offset in its entry.
  __device__ __forceinline__ char* at(const LinkArgs& link, int peer, uint64_t offset) const {
    return link.window[peer] + offset;
  }
};

__device__ __forceinline__ LinkInbox* inbox(const LinkArgs& link, int owner, int source) {
  return reinterpret_cast<LinkInbox*>(link.window[owner] + link.control.inbox(source));
}

/// False if it was given up: the host said so, or it took too long.
__device__ __forceinline__ bool wait_signal(const LinkArgs& link, const uint64_t* signal,
                                            uint64_t epoch) {
  const uint64_t begin = global_time_ns();
  for (int spin = 1; load_acquire_system(signal) < epoch; ++spin) {
    if (spin % kSpinsPerLook != 0) continue;
    if (load_relaxed_system(&link.report->abort) != 0 || global_time_ns() - begin > link.timeout_ns)
      return false;
  }
  return true;
}

/// Counts one more call in *word, of which link.progress says which.
__device__ __forceinline__ void mark_progress(volatile uint64_t* word, int32_t operation) {
  *word = (((*word >> 8) + 1) << 8) | static_cast<uint64_t>(operation);
}

/// Block 0 announces: by warps, one peer each, the next rank first. Ends without a barrier.
__device__ __forceinline__ void link_announce(const LinkArgs& link, uint64_t epoch,
                                              const int32_t* announce, int words) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int i = warp_index(); i < link.num_ranks; i += warps) {
    const int peer = (link.rank + 1 + i) % link.num_ranks;
    char* window = link.window[peer];
    copy_words<uint4>(window + link.control.counts(link.rank, epoch),
                      reinterpret_cast<const char*>(announce), words * 4);
    copy_words<uint4>(window + link.control.entry(link.rank, epoch),
                      reinterpret_cast<const char*>(&link.entry), sizeof(LinkEntry));
    __syncwarp();
    // Releases what all lanes have written.
    if (lane_index() == 0) store_release_system(&inbox(link, peer, link.rank)->entered, epoch);
  }
}

/// All ranks refuse a call alike, for they compare the same entries. The host is told once.
__device__ __forceinline__ void report_refusal(const LinkArgs& link, const LinkCall& call) {
  if (link.report->refused != 0) return;
  for (int r = 0; r < link.num_ranks; ++r) link.report->entry[r] = call.entry[r];
  fence_system();  // the host takes the epoch as the sign that the entries are there
  *static_cast<volatile uint64_t*>(&link.report->refused) = call.epoch;
}

/// Begins a call, or a phase of one: by every block, all threads. False: the link is lost. Ends
/// with a barrier.
__device__ __forceinline__ bool link_begin(const LinkArgs& link, LinkCall& call) {
  if (thread_index() == 0) {
    call.epoch = link.state->epoch + 1;
    call.bad = link.state->lost != 0;
    call.last = 0;
  }
  __syncthreads();
  return call.bad == 0;
}

/// Tells the host that a call has begun, before its first wait. By one thread of the grid.
__device__ __forceinline__ void link_mark_begun(const LinkArgs& link) {
  mark_progress(&link.progress[0], link.entry.signature[0]);
}

/// Waits for the entries of all ranks and compares them: by every block, all threads. Returns true
/// if all ranks want the same and have room; call holds their entries then. tells: the host learns
/// what they found; once per call. Ends with a barrier.
__device__ __forceinline__ bool link_agree(const LinkArgs& link, LinkCall& call,
                                           bool tells = true) {
  const int r = thread_index();
  bool lost = false, refused = false;
  if (r < link.num_ranks) {
    lost = !wait_signal(link, &inbox(link, link.rank, r)->entered, call.epoch);
    if (!lost) {
      const LinkEntry& entry = call.entry[r] = *reinterpret_cast<const LinkEntry*>(
          link.window[link.rank] + link.control.entry(r, call.epoch));
      refused = entry.needed_bytes != 0;
      for (int f = 0; f < LinkEntry::kSignatureWords; ++f)
        refused |= entry.signature[f] != link.entry.signature[f];
    }
  }
  if (__syncthreads_or(lost)) {
    if (r == 0) {
      call.bad = 1;
      atomicExch(&link.state->lost, 1u);
    }
  } else {
    refused = __syncthreads_or(refused);
    if (r == 0) {
      call.bad = refused;
      tells &= blockIdx.x == 0;
      if (refused && tells) report_refusal(link, call);
      if (link.token != 0 && tells) store_release_system(&link.report->entered, link.token);
    }
  }
  __syncthreads();
  return call.bad == 0;
}

/// Begins a call: by every block of its first kernel, all threads. Block 0 announces. Returns true
/// if all ranks have entered, want the same and have room; call holds their entries then. False:
/// move nothing, go on to link_finish. Ends with a barrier.
__device__ __forceinline__ bool link_enter(const LinkArgs& link, LinkCall& call,
                                           const int32_t* announce = nullptr, int words = 0) {
  if (!link_begin(link, call)) return false;
  if (blockIdx.x == 0) {
    if (thread_index() == 0) link_mark_begun(link);
    link_announce(link, call.epoch, announce, words);
  }
  return link_agree(link, call);
}

/// Goes on with a call that an earlier kernel on the stream has entered: by every block, all
/// threads. False: that kernel has given up. Ends with a barrier.
__device__ __forceinline__ bool link_resume(const LinkArgs& link, LinkCall& call) {
  const int r = thread_index();
  if (r == 0) {
    call.epoch = link.state->epoch + 1;
    call.bad = link.state->lost != 0;
  }
  __syncthreads();
  if (r < link.num_ranks)
    call.entry[r] = *reinterpret_cast<const LinkEntry*>(link.window[link.rank] +
                                                        link.control.entry(r, call.epoch));
  __syncthreads();
  return call.bad == 0;
}

/// Signals that what earlier kernels on the stream have stored into the peers' staging rows is
/// complete (if this rank has pushed), and waits for the peers that push. By every block, all
/// threads. False: it was given up. Ends with a barrier.
__device__ __forceinline__ bool link_pushed(const LinkArgs& link, LinkCall& call, bool pushed) {
  const int r = thread_index();
  bool lost = false;
  if (r < link.num_ranks) {
    if (pushed && blockIdx.x == 0) {
      fence_system();
      store_release_system(&inbox(link, r, link.rank)->pushed, call.epoch);
    }
    if (call.entry[r].pushed != 0)
      lost = !wait_signal(link, &inbox(link, link.rank, r)->pushed, call.epoch);
  }
  if (__syncthreads_or(lost) == 0) return true;
  if (r == 0) {
    call.bad = 1;
    atomicExch(&link.state->lost, 1u);
  }
  __syncthreads();
  return false;
}

/// By every block of the last kernel of a call, all threads, when this block's stores are written.
/// True in one block: all others have come here before it. call.bad says there whether the link is
/// lost.
__device__ __forceinline__ bool link_is_last(const LinkArgs& link, LinkCall& call) {
  __syncthreads();
  if (thread_index() == 0) {
    fence_system();  // covers the stores of the whole block, which the barrier has ordered before
    call.last = atomicAdd(&link.state->arrived, 1u) + 1 == gridDim.x;
    fence_system();  // and acquires those of the blocks that came before
    if (call.last != 0) {
      link.state->arrived = 0;
      call.bad = atomicAdd(&link.state->lost, 0u) != 0;
    }
  }
  __syncthreads();
  return call.last != 0;
}

/// The call is over on this rank. By one thread of the grid.
__device__ __forceinline__ void link_close(const LinkArgs& link, const LinkCall& call) {
  link.state->epoch = call.epoch;
  mark_progress(&link.progress[1], link.entry.signature[0]);
}

/// Ends a call: by every block of its last kernel, all threads, when this block's stores are
/// written. The last block signals, and waits for the peers. No thread needs what call holds
/// afterwards.
__device__ __forceinline__ void link_finish(const LinkArgs& link, LinkCall& call) {
  if (!link_is_last(link, call)) return;
  if (call.bad != 0) return;  // not marked as ended: the host is to notice
  const int r = thread_index();
  bool lost = false;
  if (r < link.num_ranks) {
    store_release_system(&inbox(link, (link.rank + r) % link.num_ranks, link.rank)->done,
                         call.epoch);
    lost = !wait_signal(link, &inbox(link, link.rank, r)->done, call.epoch);
  }
  lost = __syncthreads_or(lost);
  if (r != 0) return;
  if (lost)
    atomicExch(&link.state->lost, 1u);
  else
    link_close(link, call);
}

/// Ends a call without waiting: by every block, all threads. `done` is signalled all the same, for
/// peers that disagree and are in a call that waits for it.
__device__ __forceinline__ void link_leave(const LinkArgs& link, LinkCall& call) {
  if (!link_is_last(link, call) || call.bad != 0) return;
  const int r = thread_index();
  if (r < link.num_ranks) store_release_system(&inbox(link, r, link.rank)->done, call.epoch);
  if (r == 0) link_close(link, call);
}

}  // namespace epcomm
