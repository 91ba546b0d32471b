// Push: what a combine sends whose rows, one per received token, lie outside the window. They go as
// they are into the staging of the ranks that own the tokens, and are summed there as they arrive.
//
// Buffers: own_rows holds this rank's received rows, those of source rank 0 first. The rows of
// source s become the rows from `push_to` on in the window of rank s; those of this rank itself
// stay.
// Launch: by the blocks of the kernel that sums (pull.cu) which start first. All rows for one rank
// are one run of bytes, cut into pieces; these are numbered across the ranks in turn, the next rank
// first, and go to whoever comes for them: rows arrive at every owner in the order of its tokens. A
// warp has kPushStages pieces in shared memory. Without bulk copies (before sm_90) it copies
// through registers. The block's last warp tells how far the block has come. Memory order:
// kernels/arrivals.cuh. Each thread waits until its bulk stores are written before its block goes
// on.
#pragma once

#include "kernels/arrivals.cuh"
#include "kernels/device.cuh"
#include "kernels/link.cuh"
#include "kernels/piece_numbers.cuh"
#include "kernels/rows.cuh"

namespace epcomm {

constexpr int kPushStages = 4;
constexpr int kPushWarps = 6;
constexpr int kPushPieceBytes = 8 << 10;
constexpr size_t kPushSharedBytes = size_t{kPushWarps} * kPushStages * kPushPieceBytes;
static_assert(kPushPieceBytes % kBulkLine == 0);

/// What goes where, in shared memory; by turn: turn i is rank (this rank + 1 + i).
struct PushRuns {
  const char* from[kMaxLinkRanks];
  char* to[kMaxLinkRanks];
  int64_t bytes[kMaxLinkRanks];
  int32_t turns;
  int32_t pieces;  // numbers: turn = number % turns, piece = number / turns

  /// By the first warp.
  __device__ __forceinline__ void fill(const PullArgs& args, int64_t row_bytes) {
    const int num_ranks = args.link.num_ranks, rank = args.link.rank, turn = lane_index();
    int64_t length = 0;
    if (turn < num_ranks - 1) {
      const int peer = (rank + 1 + turn) % num_ranks;
      int64_t before = 0;
      for (int s = 0; s < peer; ++s) before += args.plan.rank_count[int64_t{s} * num_ranks + rank];
      length = args.plan.rank_count[int64_t{peer} * num_ranks + rank] * row_bytes;
      from[turn] = args.own_rows + before * row_bytes;
      to[turn] = args.link.window[peer] + args.push_to;
      bytes[turn] = length;
    }
    const int longest = static_cast<int>((length + kPushPieceBytes - 1) / kPushPieceBytes);
    const int most = static_cast<int>(__reduce_max_sync(kFullWarp, static_cast<uint32_t>(longest)));
    if (turn == 0) {
      turns = num_ranks - 1;
      pieces = most * turns;
    }
  }
  /// Of the bytes for rank peer, those in pieces with numbers below `below`; or more than all.
  __device__ __forceinline__ int64_t bytes_below(int below, int peer, int rank) const {
    const int turn = (peer - rank + turns) % (turns + 1);
    return below <= turn ? 0 : ((below - turn - 1) / turns + 1) * int64_t{kPushPieceBytes};
  }
};

struct PushPiece {
  int32_t number;
  uint32_t bytes = 0;  ///< 0: a run that has ended before others
  const char* from = nullptr;
  char* to = nullptr;

  PushPiece() = default;
  __device__ __forceinline__ PushPiece(const PushRuns& runs, int number_) : number(number_) {
    const int piece = number / runs.turns, turn = number - piece * runs.turns;
    const int64_t at = int64_t{piece} * kPushPieceBytes, left = runs.bytes[turn] - at;
    if (left <= 0) return;
    from = runs.from[turn] + at;
    to = runs.to[turn] + at;
    bytes = static_cast<uint32_t>(min(left, int64_t{kPushPieceBytes}));
  }
};

/// One warp's share, number w of `warps`.
__device__ __forceinline__ void push_pieces(const PullArgs& args, const PushRuns& runs, int w,
                                            int warps, SentByWarp sent, BulkBarrier* loaded,
                                            char* stages) {
  const bool leads = lane_index() == 0;
  if (leads)
    for (int s = 0; s < kPushStages; ++s) barrier_init(loaded + s);
  fence_barrier_init();
  __syncwarp();
  PushPiece ahead[kPushStages];
  bool there[kPushStages];
  constexpr int kUnwritten = 2;        // pieces that may be on their way when the warp tells
  int32_t unwritten[kUnwritten] = {};  // numbers of the pieces that were stored last
  auto load = [&](int s, int number) {
    there[s] = number < runs.pieces;
    if (!there[s]) return;
    ahead[s] = PushPiece(runs, number);
    if (!leads) return;
    barrier_expect(loaded + s, ahead[s].bytes);
    if (ahead[s].bytes != 0)
      bulk_load(stages + s * kPushPieceBytes, ahead[s].from, ahead[s].bytes, loaded + s);
  };
  PieceNumbers<kPushStages - 1> numbers(&args.link.state->pieces, w, warps, runs.pieces);
#pragma unroll
  for (int s = 0; s < kPushStages - 1; ++s) load(s, w + s * warps);
  for (uint32_t parity = 0;; parity ^= 1) {
#pragma unroll
    for (int s = 0; s < kPushStages; ++s) {
      if (!there[s]) {
        bulk_wait_written();
        fence_global_for_bulk();
        sent.tell(runs.pieces);
        return;
      }
      barrier_wait(loaded + s, parity);
      if (leads && ahead[s].bytes != 0)
        bulk_store(ahead[s].to, stages + s * kPushPieceBytes, ahead[s].bytes);
      bulk_commit();
      unwritten[s % kUnwritten] = ahead[s].number;
      if (const int oldest = unwritten[(s + 1) % kUnwritten]; sent.due(oldest)) {
        bulk_wait_written<kUnwritten>();
        fence_global_for_bulk();
        sent.tell(oldest);
      }
      // The stage to load into is that of the piece before, which may still be read.
      bulk_wait_read<1>();
      __syncwarp();
      load((s + kPushStages - 1) % kPushStages, numbers.take());
    }
  }
}

/// A block's share of what this rank pushes; blocks and warps of a block that push: the first ones.
/// loaded: kPushStages barriers of each warp. By all threads; ends without a barrier.
__device__ __forceinline__ void push_share(const PullArgs& args, const LinkCall& call,
                                           const PushRuns& runs, int blocks, int warps,
                                           int64_t row_bytes, SentTokens& sent,
                                           BulkBarrier* loaded) {
  const LinkArgs& link = args.link;
  const int warp = warp_index(), last = static_cast<int>(blockDim.x) / kWarpSize - 1;
  const int step = signal_step(runs.pieces);
  if (warp == last)
    return publish_sent(
        link, args.arrivals, call, sent, warps, {runs.pieces, step}, [&](int, int below) {
          const int64_t rows = runs.bytes_below(below, lane_index(), link.rank) / row_bytes;
          return static_cast<int32_t>(min(rows, int64_t{ArrivalLayout::kAll - 1}));
        });
  if (warp >= warps) return;
  const int w = warp * blocks + call.block;
  SentByWarp told(&sent, step);
  if constexpr (kHasBulkCopies) {
    push_pieces(args, runs, w, warps * blocks, told, loaded + warp * kPushStages,
                dynamic_shared() + warp * kPushStages * kPushPieceBytes);
  } else {
    for (int number = w; number < runs.pieces; number += warps * blocks) {
      if (told.due(number)) told.tell(number);
      const PushPiece piece(runs, number);
      copy_words<uint4>(piece.to, piece.from, static_cast<int>(piece.bytes));
    }
    told.tell(runs.pieces);
  }
}

}  // namespace epcomm
