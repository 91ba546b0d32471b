// What the kernels for small batches share: which blocks send and which receive, which rows of a
// batch a block sends, and the signals that say that they have been stored.
//
// In a whole call the first half of the blocks sends and the others receive, so that nothing that
// has to be done before rows can be taken waits until this rank's own are on their way. A half of a
// call, and a grid of one block, has all of its blocks do all there is to do.
//
// Row i of a batch belongs to share i % kShares, and a share to one block of its source. The block
// stores its rows, then signals its shares; a warp of the receiver waits for the share of the row
// it is about to read. So no grid waits for all of its blocks, and ranks may use different numbers
// of blocks.
//
// Memory order: the threads of a block store rows, meet at a barrier, then one thread per (share,
// rank) releases the signal at system scope, which covers the whole block. Each lane that reads the
// rows has acquired the signal itself, or is ordered by __syncwarp after a lane that has.
//
// A link that puts (kernels/link.cuh) has the rows stored into this rank's own window, and one warp
// per (share, rank) puts those that the rank gets, each with a signal.
#pragma once

#include "epcomm/types.h"
#include "kernels/device.cuh"
#include "kernels/link.cuh"
#include "kernels/rows.cuh"
#include "kernels/token_layout.h"

namespace epcomm {

constexpr int kSmallThreads = 512;
constexpr int kSmallWarps = kSmallThreads / kWarpSize;

/// Words of a bit mask of a rank's tokens.
__host__ __device__ constexpr int mask_words(int max_tokens) {
  return (max_tokens + kWarpSize - 1) / kWarpSize;
}

constexpr int kSmallUnroll = 8;  ///< vectors of a row that a lane copies in one go

/// The parts that the blocks of the grid have in a call.
struct SmallBlocks {
  int senders;   ///< blocks 0 to senders - 1
  int receiver;  ///< number of this block among those that receive; negative: it does not
  int receivers;

  __device__ __forceinline__ explicit SmallBlocks(Phase phase) {
    const int blocks = static_cast<int>(gridDim.x);
    senders = phase == Phase::kReceive ? 0 : blocks;
    receivers = phase == Phase::kSend ? 0 : blocks;
    receiver = phase == Phase::kSend ? -1 : static_cast<int>(blockIdx.x);
    if (phase != Phase::kAll || blocks == 1) return;
    senders = (blocks + 1) / 2;
    receivers -= senders;
    receiver -= senders;
  }
  __device__ __forceinline__ bool sends() const { return static_cast<int>(blockIdx.x) < senders; }
  __device__ __forceinline__ bool receives() const { return receiver >= 0; }

  // Threads and warps of all blocks that receive, numbered.
  __device__ __forceinline__ int threads() const { return receivers * kSmallThreads; }
  __device__ __forceinline__ int warps() const { return receivers * kSmallWarps; }
  __device__ __forceinline__ int thread() const {
    return receiver * kSmallThreads + thread_index();
  }
  // So that the first few lie in as many blocks.
  __device__ __forceinline__ int spread_thread() const {
    return thread_index() * receivers + receiver;
  }
  __device__ __forceinline__ int spread_warp() const { return warp_index() * receivers + receiver; }
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
    count = rows / kShares * shares + below(rows % kShares);
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
/// below rows.
struct SmallJobs {
  static constexpr int kMostParts = 16;
  int parts, units, vectors;
  int first, step, count;

  /// Of the rows that a block sends. least_parts: of a row, however many rows there are.
  static __device__ SmallJobs of_block(int rows, int row_bytes, int unroll, int least_parts = 1) {
    return SmallJobs(rows, row_bytes, unroll, least_parts, warp_index(), kSmallWarps);
  }
  static __device__ SmallJobs of_receivers(const SmallBlocks& blocks, int rows, int row_bytes,
                                           int unroll) {
    return SmallJobs(rows, row_bytes, unroll, 1, blocks.spread_warp(), blocks.warps());
  }
  __device__ __forceinline__ RowJob at(int job) const {
    const int row = job / parts, part = job - row * parts;
    return {row, units * part / parts * kWarpSize,
            min(units * (part + 1) / parts * kWarpSize, vectors), part == 0};
  }

 private:
  __device__ __forceinline__ SmallJobs(int rows, int row_bytes, int unroll, int least_parts,
                                       int first_, int step_)
      : parts(1), first(first_), step(step_) {
    vectors = row_bytes / kVectorBytes;
    units = (vectors + kWarpSize - 1) / kWarpSize;
    int least_batches = 0;
    for (int p = 1; p <= kMostParts && (p == 1 || p <= units); p *= 2) {
      const int rounds = (rows * p + step - 1) / step;
      const int batches = rounds * (((units + p - 1) / p + unroll - 1) / unroll);
      // As many warps as there are, but no round more.
      if (p != 1 && (batches > least_batches || (batches == least_batches && rounds > 1))) continue;
      parts = p;
      least_batches = batches;
    }
    parts = max(parts, least_parts);
    count = rows * parts;
  }
};

/// The signal of row i of source, in this rank's window: its share's, or its own where the link
/// puts.
template <class Link>
__device__ __forceinline__ const uint64_t* row_signal(const LinkArgs& link,
                                                      const SmallLayout& small, int source, int i) {
  static_assert(SmallLayout::kSignals >= kTileTokens);
  const int signal = Link::kMapped ? i % SmallLayout::kShares : i;
  return reinterpret_cast<const uint64_t*>(link.window[link.rank] + small.signal(source, signal));
}

/// Says that this block's rows are stored, by all threads; where the link puts, puts each with a
/// signal of its own, so that none must land before another. own: of any number of rows. rows(r)
/// gives how many rows all blocks together send to rank r, piece(r, i) where the i-th of them is (0
/// bytes = rank r does not get it). Begins with a barrier.
template <class Link, class Rows, class Piece>
__device__ __forceinline__ void signal_shares(const LinkArgs& link, const SmallLayout& small,
                                              uint64_t epoch, const BlockRows& own, Rows rows,
                                              [[maybe_unused]] Piece piece) {
  __syncthreads();
  if constexpr (Link::kMapped) {
    for (int i = thread_index(); i < own.shares * link.num_ranks; i += kSmallThreads) {
      const int share = own.first + i / link.num_ranks * own.step;
      const int peer = (link.rank + i) % link.num_ranks;
      if (share < rows(peer)) link_signal<Link>(link, peer, small.signal(link.rank, share), epoch);
    }
  } else {
    fence_system();  // what the block has stored is read by a network card
    for (int i = warp_index(); i < own.shares * link.num_ranks; i += kSmallWarps) {
      const int share = own.first + i / link.num_ranks * own.step;
      const int peer = (link.rank + 1 + i) % link.num_ranks;
      for (int row = share; row < rows(peer); row += BlockRows::kShares) {
        const LinkPiece put = piece(peer, row);
        if (put.bytes != 0)
          link_put_signal<Link>(link, peer, put, small.signal(link.rank, row), epoch);
      }
    }
  }
}

/// Waits for row i of source. Every lane that asks acquires it. Lanes that need none pass i < 0. By
/// a warp, whose lanes have one source or each its own; false in all lanes if a wait was given up.
template <class Link>
__device__ __forceinline__ bool rows_arrived(const LinkArgs& link, const SmallLayout& small,
                                             uint64_t epoch, int source, int i) {
  const int first = __shfl_sync(kFullWarp, source, 0);
  const bool notes = lane_index() == 0 || source != first;
  const bool there =
      i < 0 ||
      wait_signal<Link>(link, source, row_signal<Link>(link, small, source, i), epoch, notes);
  __syncwarp();
  if (__all_sync(kFullWarp, there)) return true;
  if (lane_index() == 0) atomicExch(&link.state->lost, 1u);
  return false;
}

}  // namespace epcomm
