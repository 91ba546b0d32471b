// Entering and leaving a call of a small batch: what ranks compare has come without a signal, and
// nobody waits for peers at the end. What larger calls do: kernels/link.cuh.
//
// Memory order: a TaggedWord says by its epoch that it has come, and orders nothing else.
#pragma once

#include "kernels/device.cuh"
#include "kernels/link.cuh"

namespace epcomm {

/// Waits for a word of source that carries the epoch. By a warp; lanes that need none pass null.
/// Returns what the lane's word says. lost: set in all lanes if it was given up.
__device__ __forceinline__ uint32_t wait_tagged(const LinkArgs& link, int source,
                                                const uint64_t* tagged, uint64_t epoch,
                                                bool& lost) {
  uint64_t begin = 0;
  for (int spin = 1;; ++spin) {
    const uint64_t word = tagged != nullptr ? load_relaxed_system(tagged) : 0;
    if (__all_sync(kFullWarp, tagged == nullptr || TaggedWord::is_of(word, epoch))) {
      if (begin != 0 && lane_index() == 0 && link.statistics.max_wait_ns != nullptr)
        note_wait(link.statistics, source, global_time_ns() - begin);
      return static_cast<uint32_t>(word);
    }
    if (begin == 0) begin = global_time_ns();
    if (spin % kSpinsPerLook == 0 && __any_sync(kFullWarp, gives_up(link, begin))) {
      lost = true;
      return 0;
    }
  }
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

/// As link_agree, where what is compared has come with the brief entries: by every block of a
/// kernel for small batches. Fills num_tokens of call.entry only, where all is well. lost: the warp
/// has given up a wait before, which ends the call.
template <class Link>
__device__ __forceinline__ bool link_agree_briefly(const LinkArgs& link, LinkCall& call, bool tells,
                                                   bool lost = false) {
  if constexpr (!Link::kMapped) return link_agree<Link>(link, call, tells);
  bool doubtful = false;
  const int lane = lane_index(), warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int s = warp_index(); s < link.num_ranks && !lost; s += warps) {
    const uint64_t* word = brief_word(link, call.epoch, s);
    const uint32_t value = wait_tagged(link, s, word, call.epoch, lost);
    if (lane == LinkBrief::kNumTokens) call.entry[s].num_tokens = static_cast<int32_t>(value);
    doubtful |= is_doubtful(link, value);
  }
  if (__syncthreads_or(lost || doubtful) == 0) {
    if (thread_index() == 0 && link.token != 0 && tells)
      store_release_system(&link.report->entered, link.token);
    return true;
  }
  if (__syncthreads_or(lost) == 0) {
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

/// Ends a call without waiting for peers: by every block, all threads. agreed: of link_agree, or
/// true of a block that did not ask. If a block says false, `done` is signalled all the same, for
/// peers that disagree and are in a call that waits for it. completed: this thread has given up no
/// wait since. What a block has to say of itself goes with its arrival: the last has nothing to ask
/// then. sent: where the link puts, this block may have put something; others have nothing that the
/// last one's quiet is to cover.
template <class Link = PeerLink>
__device__ __forceinline__ void link_leave(const LinkArgs& link, LinkCall& call, bool agreed,
                                           bool completed, bool sent) {
  constexpr uint32_t kLostBlock = 1 << 10, kRefusingBlock = 1 << 20;  // there are fewer SMs
  const bool lost = __syncthreads_or(!completed || call.bad == LinkCall::kLost) != 0;
  const int r = thread_index();
  if (r == 0) {
    const uint32_t own = 1 + (lost ? kLostBlock : 0) + (agreed ? 0 : kRefusingBlock);
    const bool releases = (!Link::kMapped && sent) || !agreed;
    if (releases) fence_system();
    const uint32_t arrived = atomicAdd(&link.state->arrived, own) + own;
    call.last = arrived % kLostBlock == gridDim.x;
    if (call.last != 0) {
      link.state->arrived = 0;
      call.bad = arrived % kRefusingBlock >= kLostBlock ? LinkCall::kLost
                 : arrived >= kRefusingBlock            ? LinkCall::kRefused
                                                        : 0;
      if constexpr (Link::kMapped) {
        // Of a refused call nobody has read what was staged.
        const uint32_t clean = call.bad == 0;
        if (call.bad != LinkCall::kLost) link.state->clean[call.epoch & 1] = clean;
      }
      if constexpr (!Link::kMapped) {
        fence_system();  // acquires what the blocks have put that came before
        if (call.bad == 0) Link::quiet(link);
      }
      if (call.bad == 0) link_close(link, call);
    }
  }
  __syncthreads();
  if (call.last == 0 || call.bad == LinkCall::kLost) return;  // lost: the host is to notice
  if (call.bad == 0) return;
  fence_system();
  link_quiet<Link>(link);
  if (r < link.num_ranks)
    link_signal<Link>(link, r, own_inbox(link, offsetof(LinkInbox, done)), call.epoch);
  link_quiet<Link>(link);
  if (r == 0) link_close(link, call);
}

}  // namespace epcomm
