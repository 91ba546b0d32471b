// Push: the first half of a combine whose rows, one per received token, lie outside the window.
// They go as they are into the staging of the ranks that own the tokens, and pull sums them there.
//
// Buffers: x holds this rank's received rows, those of source rank 0 first. The rows of source s
// become the rows from `staging` on in the window of rank s; those of this rank itself stay.
// Launch: num_sms blocks, one per SM. All rows for one rank are one run of bytes, cut into pieces;
// these are numbered across the ranks in turn, the next rank first, and go to whoever comes for
// them. A warp has kStages pieces in shared memory. Without bulk copies (before sm_90) it copies
// through registers.
// Memory order: kernels/link.cuh. Each thread waits until its bulk stores are written; the kernel
// ends, and pull releases the signal `pushed`.
#include <algorithm>

#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/piece_numbers.cuh"
#include "kernels/rows.cuh"

namespace epcomm {
namespace {

constexpr int kStages = 4;
constexpr int kWarps = 6;
constexpr int kPieceBytes = 8 << 10;
constexpr size_t kStageBytes = size_t{kWarps} * kStages * kPieceBytes;
static_assert(kPieceBytes % kBulkLine == 0);

// What goes where, in shared memory; by turn: turn i is rank (this rank + 1 + i).
struct Runs {
  const char* from[kMaxLinkRanks];
  char* to[kMaxLinkRanks];
  int64_t bytes[kMaxLinkRanks];
  int32_t turns;
  int32_t pieces;  // numbers: turn = number % turns, piece = number / turns

  // By the first warp.
  __device__ __forceinline__ void fill(const PushArgs& args) {
    const int num_ranks = args.link.num_ranks, rank = args.link.rank, turn = lane_index();
    int64_t length = 0;
    if (turn < num_ranks - 1) {
      const int peer = (rank + 1 + turn) % num_ranks;
      int64_t before = 0;
      for (int s = 0; s < peer; ++s) before += args.plan.rank_count[int64_t{s} * num_ranks + rank];
      length = args.plan.rank_count[int64_t{peer} * num_ranks + rank] * args.row_bytes;
      from[turn] = args.x + before * args.row_bytes;
      to[turn] = args.link.window[peer] + args.staging;
      bytes[turn] = length;
    }
    const int longest = static_cast<int>((length + kPieceBytes - 1) / kPieceBytes);
    const int most = static_cast<int>(__reduce_max_sync(kFullWarp, static_cast<uint32_t>(longest)));
    if (turn == 0) {
      turns = num_ranks - 1;
      pieces = most * turns;
    }
  }
};

struct RunPiece {
  const char* from = nullptr;
  char* to = nullptr;
  uint32_t bytes = 0;  // 0: a run that has ended before others

  RunPiece() = default;
  __device__ __forceinline__ RunPiece(const Runs& runs, int number) {
    const int piece = number / runs.turns, turn = number - piece * runs.turns;
    const int64_t at = int64_t{piece} * kPieceBytes, left = runs.bytes[turn] - at;
    if (left <= 0) return;
    from = runs.from[turn] + at;
    to = runs.to[turn] + at;
    bytes = static_cast<uint32_t>(min(left, int64_t{kPieceBytes}));
  }
};

// One warp's share, number w of `warps`.
__device__ __forceinline__ void push_runs(const PushArgs& args, const Runs& runs, int w, int warps,
                                          BulkBarrier* loaded, char* stages) {
  const bool leads = lane_index() == 0;
  if (leads)
    for (int s = 0; s < kStages; ++s) barrier_init(loaded + s);
  fence_barrier_init();
  __syncwarp();
  RunPiece ahead[kStages];
  bool there[kStages];
  auto load = [&](int s, int number) {
    there[s] = number < runs.pieces;
    if (!there[s]) return;
    ahead[s] = RunPiece(runs, number);
    if (!leads) return;
    barrier_expect(loaded + s, ahead[s].bytes);
    if (ahead[s].bytes != 0)
      bulk_load(stages + s * kPieceBytes, ahead[s].from, ahead[s].bytes, loaded + s);
  };
  PieceNumbers<kStages - 1> numbers(&args.link.state->pieces, w, warps, runs.pieces);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load(s, w + s * warps);
  for (uint32_t parity = 0;; parity ^= 1) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (!there[s]) {
        bulk_wait_written();
        fence_global_for_bulk();
        return;
      }
      barrier_wait(loaded + s, parity);
      if (leads && ahead[s].bytes != 0)
        bulk_store(ahead[s].to, stages + s * kPieceBytes, ahead[s].bytes);
      bulk_commit();
      // The stage to load into is that of the piece before, which may still be read.
      bulk_wait_read<1>();
      __syncwarp();
      load((s + kStages - 1) % kStages, numbers.take());
    }
  }
}

__global__ void __launch_bounds__(kWarps* kWarpSize, 1)
    push_kernel(const __grid_constant__ PushArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  EPCOMM_SHARED(Runs, runs);
  EPCOMM_SHARED(BulkBarrier[kWarps * kStages], loaded);
  if (!link_enter(args.link, call)) return;
  if (warp_index() == 0) runs.fill(args);
  __syncthreads();
  if (runs.pieces == 0) return;
  const int blocks = static_cast<int>(gridDim.x), warp = warp_index();
  const int w = warp * blocks + static_cast<int>(blockIdx.x), warps = kWarps * blocks;
  if constexpr (kHasBulkCopies) {
    push_runs(args, runs, w, warps, loaded + warp * kStages,
              dynamic_shared() + warp * kStages * kPieceBytes);
  } else {
    for (int number = w; number < runs.pieces; number += warps) {
      const RunPiece piece(runs, number);
      copy_words<uint4>(piece.to, piece.from, static_cast<int>(piece.bytes));
    }
  }
}

}  // namespace

void launch_push(const PushArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.x, "x");
  const bool bulk = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  launch("launch of push", push_kernel,
         {persistent_blocks(num_sms), kWarps * kWarpSize, bulk ? kStageBytes : 0}, stream, args);
}

}  // namespace epcomm
