// How rows are worked on while later ones are still on their way: a block that sends says how far
// it has come, and blocks that receive take the tokens that are there.
//
// Memory order: a warp that sends waits until its bulk stores are written, then releases the number
// of its tokens to its block (SentTokens). One warp of the block acquires what all have released,
// and releases a word at system scope to each rank (publish_sent; cumulative, so it covers the
// stores of the whole block). One warp of a receiving block polls the words of all blocks of all
// ranks, acquires at system scope and releases counts to its block (watch_arrivals); warps acquire
// a count before they touch what it covers, and cross to the async proxy before a bulk load.
// Waits: only watch_arrivals waits for peers, and gives up as link_finish does.
#pragma once

#include "kernels/device.cuh"
#include "kernels/link.cuh"
#include "kernels/rows.cuh"

namespace epcomm {

constexpr int kMaxBlockWarps = 32;
constexpr int kShortestNapNs = 100;  ///< between looks at words of the own block

/// In shared memory: of the tokens below below[w], warp w has nothing more to store.
struct SentTokens {
  int32_t below[kMaxBlockWarps];

  /// By the block, before a barrier.
  __device__ __forceinline__ void clear() {
    if (thread_index() < kMaxBlockWarps) below[thread_index()] = 0;
  }
};

/// A warp's own entry of SentTokens, told in steps.
class SentByWarp {
 public:
  /// sent null: nobody wants to know.
  __device__ __forceinline__ SentByWarp(SentTokens* sent, int step)
      : below_(sent == nullptr ? nullptr : &sent->below[warp_index()]), step_(step), next_(step) {}
  /// Whether it is time to tell: all tokens below `token` are done.
  __device__ __forceinline__ bool due(int token) const {
    return below_ != nullptr && token >= next_;
  }
  /// When the lanes' stores are written.
  __device__ __forceinline__ void tell(int token) {
    if (below_ == nullptr) return;
    __syncwarp();
    if (lane_index() == 0) store_release_block(below_, token);
    next_ = token + step_;
  }

 private:
  int32_t* below_;
  int32_t step_, next_;
};

/// Tokens between two signals.
__device__ __forceinline__ int signal_step(int num_tokens) {
  constexpr int kSignals = 64, kLeast = 8;
  return max(num_tokens / kSignals, kLeast);
}

/// What the warps of a block tell in: so many tokens (or pieces, numbered in the order of each
/// rank's tokens) in all, and a signal about every step of them.
struct SentUnits {
  int32_t count, step;
};

/// By one warp of a block that sends: tells all ranks how far the block has come, until it has sent
/// everything. warps: those of the block that send, the first ones. tokens(told, below): of the
/// tokens for the rank of the lane, how many have all their units below `below`; called for growing
/// values, each time with the one before as `told`.
template <class Tokens>
__device__ __forceinline__ void publish_sent(const LinkArgs& link, const ArrivalLayout& arrivals,
                                             const LinkCall& call, const SentTokens& sent,
                                             int warps, const SentUnits& units, Tokens tokens) {
  const int lane = lane_index();
  for (int told = 0;;) {
    int32_t below = lane < warps ? load_acquire_block(&sent.below[lane]) : units.count;
    below = __reduce_min_sync(kFullWarp, below);
    const bool all = below >= units.count;
    if (!all && below < told + units.step) {
      if (lane == 0) __nanosleep(kShortestNapNs);
      continue;
    }
    __syncwarp();  // each lane releases what all have acquired
    if (lane < link.num_ranks) {
      const uint64_t word = all ? ArrivalLayout::signal_all(call.epoch)
                                : ArrivalLayout::signal(call.epoch, tokens(told, below));
      char* to = link.window[lane] + arrivals.word(link.rank, call.block);
      store_release_system(reinterpret_cast<uint64_t*>(to), word);
    }
    if (all) return;
    told = below;
  }
}

/// Tokens of one source, numbered as that source counts them here.
struct SourceTokens {
  int32_t first, count;
};

/// What a block knows of the tokens that arrive, in shared memory; by source rank.
struct Arrivals {
  int32_t base[kMaxLinkRanks];   ///< number of the first
  int32_t total[kMaxLinkRanks];  ///< tokens that it sends here, of those that are waited for
  int32_t count[kMaxLinkRanks];  ///< of them, the first that are here
  int32_t taken[kMaxLinkRanks];  ///< of them, so many or more are worked on, by any block
  int32_t lost;                  ///< not 0: no more will come
  int32_t may_wait;

  /// By the whole block; ends with a barrier. senders: blocks of this rank that send. tokens(s):
  /// those of source s.
  template <class Tokens>
  __device__ __forceinline__ void fill(const LinkArgs& link, int senders, Tokens tokens) {
    if (const int s = thread_index(); s < link.num_ranks) {
      const SourceTokens of = tokens(s);
      base[s] = of.first;
      total[s] = of.count;
      count[s] = taken[s] = 0;
    }
    if (thread_index() == 0) {
      lost = 0;
      // Who waits for rows must not keep a block from its SM that sends some.
      may_wait = atomicAdd(&link.state->started, 0u) >= static_cast<uint32_t>(senders);
    }
    __syncthreads();
  }
};

/// By one warp of a block: follows what all sources say until all is here, or it is given up.
__device__ __forceinline__ void watch_arrivals(const LinkArgs& link, const ArrivalLayout& arrivals,
                                               const LinkCall& call, Arrivals& here) {
  static_assert(ArrivalLayout::kMaxSenders == kWarpSize);
  constexpr int kAtATime = 4;  // sources
  const int lane = lane_index(), num_ranks = link.num_ranks;
  auto count_of = [&](int s) {
    if (s >= num_ranks || lane >= call.entry[s].senders) return ArrivalLayout::kAll;
    const char* word = link.window[link.rank] + arrivals.word(s, lane);
    return ArrivalLayout::count(load_relaxed_system(reinterpret_cast<const uint64_t*>(word)),
                                call.epoch);
  };
  uint64_t begin = global_time_ns();
  for (int spin = 1;; ++spin) {
    bool complete = true, news = false;
    for (int first = 0; first < num_ranks; first += kAtATime) {
      int32_t count[kAtATime];
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) count[i] = count_of(first + i);
      bool more = false;
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        count[i] = __reduce_min_sync(kFullWarp, count[i]);
        if (first + i >= num_ranks) continue;
        count[i] = min(count[i], here.total[first + i]);
        complete &= count[i] == here.total[first + i];
        more |= count[i] > here.count[first + i];
      }
      if (!more) continue;
      news = true;
      fence_system();  // acquires, with the loads before
      __syncwarp();
      if (lane != 0) continue;
#pragma unroll
      for (int i = 0; i < kAtATime; ++i)
        if (first + i < num_ranks) store_release_block(&here.count[first + i], count[i]);
    }
    if (complete) return;
    if (news) begin = global_time_ns();
    __syncwarp();  // all lanes see what lane 0 has stored
    if (spin % kSpinsPerLook != 0) continue;
    const bool late =
        load_relaxed_system(&link.report->abort) != 0 || global_time_ns() - begin > link.timeout_ns;
    if (!__any_sync(kFullWarp, late)) continue;
    if (lane == 0) {
      atomicExch(&link.state->lost, 1u);
      store_release_block(&here.lost, 1);
    }
    return;
  }
}

/// Tokens of a source, the first of them number `begin` of that source's; count 0 = none.
struct ArrivedTokens {
  int32_t source = 0, begin = 0, count = 0;
};

/// As take_arrived, for one lane.
template <int kMost>
__device__ __forceinline__ ArrivedTokens take_by_lane(const LinkArgs& link, Arrivals& here) {
  auto now = [](const int32_t& word) { return *static_cast<const volatile int32_t*>(&word); };
  for (;; __nanosleep(kShortestNapNs)) {
    // From the source of which most is waiting.
    int source = -1, most = 0;
    bool left = false;
    for (int s = 0; s < link.num_ranks; ++s) {
      const int32_t taken = now(here.taken[s]), total = here.total[s], count = now(here.count[s]);
      if (taken >= total) continue;
      left = true;
      if (min(taken + kMost, total) > count || count - taken <= most) continue;
      most = count - taken;
      source = s;
    }
    if (!left || load_acquire_block(&here.lost) != 0) return {};
    if (source < 0) continue;
    const auto begin = static_cast<int32_t>(atomicAdd(&link.state->taken[source], uint32_t{kMost}));
    atomicMax(&here.taken[source], begin + kMost);
    const int32_t count = min(kMost, here.total[source] - begin);
    if (count <= 0) continue;
    // Others may have taken what was here; these come next.
    while (load_acquire_block(&here.count[source]) < begin + count) {
      if (load_acquire_block(&here.lost) != 0) return {};
      __nanosleep(kShortestNapNs);
    }
    return {source, begin, count};
  }
}

/// The next tokens that are here and that nobody else works on, at most kMost; none: nothing is
/// left to do. By a warp, which has acquired their rows then.
template <int kMost>
__device__ __forceinline__ ArrivedTokens take_arrived(const LinkArgs& link, Arrivals& here) {
  ArrivedTokens tokens;
  if (lane_index() == 0) tokens = take_by_lane<kMost>(link, here);
  __syncwarp();
  tokens.source = __shfl_sync(kFullWarp, tokens.source, 0);
  tokens.begin = __shfl_sync(kFullWarp, tokens.begin, 0);
  tokens.count = __shfl_sync(kFullWarp, tokens.count, 0);
  return tokens;
}

/// What a warp knows of rows that arrive; lane s of those of source s.
class ArrivedRows {
 public:
  /// Bit s of sources: rows of source s are waited for. Other sources' are there.
  __device__ __forceinline__ ArrivedRows(const Arrivals& here, uint32_t sources)
      : here_(here), waits_((sources >> lane_index() & 1) != 0) {}
  /// Until the row of each lane is there, numbered as Arrivals::base is; -1 = no row. False: it
  /// will not come. By a warp, all of which has acquired the rows of all lanes then, also for bulk
  /// loads.
  __device__ __forceinline__ bool wait(int32_t row) {
    const int32_t needed = waits_ && row >= 0 ? row - here_.base[lane_index()] + 1 : 0;
    if (__all_sync(kFullWarp, needed <= count_)) return true;
    for (;; __nanosleep(kShortestNapNs)) {
      if (waits_) count_ = load_acquire_block(&here_.count[lane_index()]);
      if (__all_sync(kFullWarp, needed <= count_)) break;
      if (__any_sync(kFullWarp, load_acquire_block(&here_.lost) != 0)) return false;
    }
    __syncwarp();
    if constexpr (kHasBulkCopies) fence_global_for_bulk();
    return true;
  }

 private:
  const Arrivals& here_;
  bool waits_;
  int32_t count_ = 0;  // of the first rows of the lane's source, acquired
};

}  // namespace epcomm
