// What the kernels for small batches share: which blocks send and which receive, which rows of a
// batch a block sends, how rows are cut, and what was sent beside them.
//
// In a whole call the first blocks send and the others receive, so that nothing that has to be done
// before rows can be taken waits until this rank's own are on their way. A half of a call, and a
// grid of one block, has all of its blocks do all there is to do.
//
// Row i of a batch belongs to share i % kShares, and a share to one block of its source. The block
// stores its rows, then signals its shares. So no grid waits for all of its blocks, and ranks may
// use different numbers of blocks.
//
// How rows cross: kernels/small_staging.cuh.
#pragma once

#include <algorithm>

#include "epcomm/types.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/link_brief.cuh"
#include "kernels/rows.cuh"
#include "kernels/token_layout.h"

namespace epcomm {

constexpr int kSmallThreads = 512;
constexpr int kSmallWarps = kSmallThreads / kWarpSize;

/// Words of a bit mask of a rank's tokens.
__host__ __device__ constexpr int mask_words(int max_tokens) {
  return (max_tokens + kWarpSize - 1) / kWarpSize;
}

/// Of sixteen blocks, those that send. A dispatch stores each received row to all that carry it;
/// for a combine the senders load and sum all rows. To put rows that were stored takes longer: of
/// 128 tokens for three other ranks each warp has one to put, and each that receives one to take.
constexpr int kDispatchSenders = 6, kDispatchPutters = 7, kCombineSenders = 8;

/// Of a call, the blocks that send.
__host__ __device__ constexpr int sending_blocks(Phase phase, int blocks, int sixteenths) {
  if (phase == Phase::kReceive) return 0;
  return phase != Phase::kAll || blocks == 1 ? blocks : (blocks * sixteenths + 15) / 16;
}

/// Blocks of a launch: num_sms, or by default as many as make a call short: few tokens should
/// spread over many SMs, for what counts is when the last byte arrives (docs/nvlink.md). In a
/// combine one announces, 64 have two of the 128 shares each, and 64 receive; a few SMs are left so
/// that blocks that announce another Buffer's call find room.
inline int small_blocks(int num_sms) {
  if (num_sms > 0) return persistent_blocks(num_sms);
  constexpr int kMost = 129, kLeft = 3;
  const int present = persistent_blocks(0);
  return std::min(kMost, present > 8 * kLeft ? present - kLeft : present);
}

constexpr int kSmallUnroll = 8;  ///< vectors of a row that a lane copies in one go

/// Blocks that share something out among their threads or warps.
struct SmallTeam {
  int block;   ///< number of this block among them; negative: it is none of them
  int blocks;  ///< of the team

  __device__ __forceinline__ bool here() const { return block >= 0 && block < blocks; }
  // Threads and warps of all its blocks, numbered.
  __device__ __forceinline__ int threads() const { return blocks * kSmallThreads; }
  __device__ __forceinline__ int warps() const { return blocks * kSmallWarps; }
  __device__ __forceinline__ int thread() const { return block * kSmallThreads + thread_index(); }
  // So that the first few lie in as many blocks. later: warps of a block that come last instead of
  // first; what different warps do takes no longer than one of them.
  __device__ __forceinline__ int spread_thread(int later = 0) const {
    return (thread_index() + (kSmallWarps - later) * kWarpSize) % kSmallThreads * blocks + block;
  }
  __device__ __forceinline__ int spread_warp(int later = 0) const {
    return (warp_index() + kSmallWarps - later) % kSmallWarps * blocks + block;
  }
};

/// The parts that the blocks of the grid have in a call.
struct SmallBlocks {
  int senders;  ///< blocks 0 to senders - 1
  SmallTeam receivers;

  /// sixteenths: of the blocks that send, in a whole call.
  __device__ __forceinline__ SmallBlocks(Phase phase, int sixteenths) {
    const int blocks = static_cast<int>(gridDim.x);
    senders = sending_blocks(phase, blocks, sixteenths);
    receivers = {phase == Phase::kSend ? -1 : static_cast<int>(blockIdx.x),
                 phase == Phase::kSend ? 0 : blocks};
    if (phase != Phase::kAll || blocks == 1) return;
    receivers.blocks -= senders;
    receivers.block -= senders;
  }
  __device__ __forceinline__ bool sends() const { return static_cast<int>(blockIdx.x) < senders; }
  __device__ __forceinline__ bool receives() const { return receivers.here(); }
};

/// The rows of a batch that this block sends, in order of shares. Block 0 announces, and sends rows
/// only if there is no other sender.
struct BlockRows {
  static constexpr int kShares = SmallLayout::kShares;
  int first, step;
  int shares;  ///< of this block: first, first + step, ...
  int count;

  __device__ BlockRows(int rows, int senders) : first(static_cast<int>(blockIdx.x)), step(senders) {
    if (step > 1) {
      first = first > 0 ? first - 1 : kShares;
      --step;
    }
    shares = below(kShares);
    count = count_of(rows);
  }
  /// Of any number of rows, those that are this block's.
  __device__ __forceinline__ int count_of(int rows) const {
    return rows / kShares * shares + below(rows % kShares);
  }
  /// Row i of count.
  __device__ __forceinline__ int at(int i) const {
    return first + i % shares * step + i / shares * kShares;
  }

 private:
  __device__ __forceinline__ int below(int end) const {
    return end > first ? (end - first + step - 1) / step : 0;
  }
};

/// Rows cut into jobs, for the warps of a block or of all that receive: into as many parts as have
/// the warps done soonest, counted in batches of `unroll` vectors a lane. RowJob::row is a number
/// below rows. Made by whole warps.
struct SmallJobs {
  static constexpr int kMostLogParts = 4;
  int log_parts;  ///< of the number of parts, a power of two
  int units, vectors;
  int unit;  ///< vectors; parts begin at multiples of it
  int first, step, count;

  /// Of the rows that a block sends. least_parts: of a row, however many rows there are.
  static __device__ SmallJobs of_block(int rows, int row_bytes, int unroll, int least_parts = 1,
                                       int unit = kWarpSize) {
    return SmallJobs(rows, row_bytes, unroll, least_parts, warp_index(), kSmallWarps, unit);
  }
  static __device__ SmallJobs of_team(const SmallTeam& team, int rows, int row_bytes, int unroll) {
    return SmallJobs(rows, row_bytes, unroll, 1, team.spread_warp(), team.warps());
  }
  __device__ __forceinline__ RowJob at(int job) const {
    const int row = job >> log_parts, part = job - (row << log_parts);
    return {row, (units * part >> log_parts) * unit,
            min((units * (part + 1) >> log_parts) * unit, vectors), part == 0};
  }

 private:
  __device__ __forceinline__ SmallJobs(int rows, int row_bytes, int unroll, int least_parts,
                                       int first_, int step_, int unit_ = kWarpSize)
      : unit(unit_), first(first_), step(step_) {
    vectors = row_bytes / kVectorBytes;
    units = (vectors + unit - 1) / unit;
    // A lane weighs each number of parts: divisions take long.
    const int log = min(lane_index(), kMostLogParts), parts = 1 << log;
    const int rounds = (rows * parts + step - 1) / step;
    const int loads = ((units + parts - 1) >> log) * (unit / kWarpSize);
    const int batches = rounds * ((loads + unroll - 1) / unroll);
    // Of those that are done soonest the most parts that take one round, so as many warps as there
    // are; if none does, the fewest.
    const int rank = rounds == 1 ? kMostLogParts - log : kMostLogParts + 1 + log;
    constexpr uint32_t kRanks = 16;
    const bool fits = log == 0 || parts <= units;
    const uint32_t key =
        fits ? static_cast<uint32_t>(batches) * kRanks + static_cast<uint32_t>(rank) : UINT32_MAX;
    const int best = static_cast<int>(__reduce_min_sync(kFullWarp, key) % kRanks);
    log_parts = best <= kMostLogParts ? kMostLogParts - best : best - kMostLogParts - 1;
    while (1 << log_parts < least_parts) ++log_parts;
    count = rows << log_parts;
  }
};

/// Pieces that a rank shall put its rows in, LinkEntry::pieces: with them the block that has most
/// to put is done soonest, if the ranks get their rows in pieces. peers: that a row goes to, at
/// most.
inline int pieces_to_put(int senders, int rows, int peers, int row_bytes) {
  constexpr int kRoundBytes = kWarpSize * kVectorBytes;  // that a warp copies between two waits
  constexpr int kSignalRounds = 4;  // that the fence and the signal behind a put take as long as
  const int blocks = std::max(senders - 1, 1), puts = (rows + blocks - 1) / blocks * peers;
  int best = 1, least = 0;
  for (int wanted = 1; wanted <= RowPieces::kMost; ++wanted) {
    const RowPieces pieces(row_bytes, wanted);
    const int turns = (puts * pieces.count + kSmallWarps - 1) / kSmallWarps;
    const int rounds = turns * ((pieces.step + kRoundBytes - 1) / kRoundBytes + kSignalRounds);
    if (wanted > 1 && rounds >= least) continue;
    best = wanted;
    least = rounds;
  }
  return best;
}

/// Whether ids and weights come with the entry, and rows are put (kernels/link.cuh).
template <class Link>
constexpr bool kPuts = !Link::kMapped;

/// The ids of source's slots in this rank's window: TaggedWord, or SlotWord where the link puts.
template <class Link>
__device__ __forceinline__ const uint64_t* sent_ids(const LinkArgs& link, const SmallLayout& small,
                                                    uint64_t epoch, int source) {
  return reinterpret_cast<const uint64_t*>(
      link.window[link.rank] +
      (kPuts<Link> ? link.control.slots(source, epoch) : small.source_ids(source, epoch)));
}
/// Their weights, likewise.
template <class Link>
__device__ __forceinline__ const uint64_t* sent_weights(const LinkArgs& link,
                                                        const SmallLayout& small, uint64_t epoch,
                                                        int source) {
  return reinterpret_cast<const uint64_t*>(
      link.window[link.rank] +
      (kPuts<Link> ? link.control.slots(source, epoch) : small.source_weights(source, epoch)));
}

/// By one thread: word i of an array of TaggedWord.
__device__ __forceinline__ void store_tagged(char* words, int i, uint64_t epoch, uint32_t value) {
  store_relaxed_system(reinterpret_cast<uint64_t*>(words) + i, TaggedWord::of(epoch, value));
}

/// The weight in a word of sent_weights.
template <class Link>
__device__ __forceinline__ float weight_in(uint64_t word) {
  return __uint_as_float(kPuts<Link> ? SlotWord::weight(word) : static_cast<uint32_t>(word));
}

/// The lane's weight of source's, at a word of sent_weights, by a warp; lanes that need none pass
/// null. lost: set if a wait was given up.
template <class Link>
__device__ __forceinline__ float sent_weight(const LinkArgs& link, int source, const uint64_t* word,
                                             uint64_t epoch, bool& lost) {
  if constexpr (Link::kMapped) return __uint_as_float(wait_tagged(link, source, word, epoch, lost));
  if (word == nullptr) return 0.0f;
  return weight_in<Link>(*word);
}

}  // namespace epcomm
