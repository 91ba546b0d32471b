// Pull: the owner's side of a combine. The owner of a token loads its rows from the windows of the
// ranks that have them, or the partial rows that a rank has pushed from its own staging, and sums.
//
// Buffers: rank r's rows lie in its window at the offset that it announced, row slot[t, r] for
// token t; partial rows of rank r at staging row r * max_tokens + (index of t among the tokens that
// go to r). topk_weights, plan.topk_idx [T, K] and bias [T, hidden] are this rank's own; out is
// written.
// Launch: num_sms blocks, one per SM. A warp takes a piece of a token: it loads the piece of every
// rank's row into shared memory (lane r that of rank r), kStages pieces ahead, and sums what has
// come. Without bulk copies (before sm_90) it loads through registers.
// Memory order: kernels/link.cuh. The rows are acquired with the entries of their ranks, partial
// rows with `pushed`; `done` says that they were read.
#include <algorithm>

#include "kernels/device.cuh"
#include "kernels/elements.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/rows.cuh"

namespace epcomm {
namespace {

constexpr int kStages = 3;
constexpr int kMaxWarps = 8;
constexpr int kMaxPieceBytes = 2048;
constexpr int kStepBytes = kVectorBytes * kWarpSize;  // what a warp sums at a time
constexpr size_t kSharedBytes = 208 << 10;

struct PullShape {
  int32_t pieces;       // of a row
  int32_t piece_bytes;  // a multiple of kStepBytes; the last may be shorter
};
struct PullKernelArgs {
  PullArgs pull;
  PullShape shape;
};
static_assert(sizeof(PullKernelArgs) <= kMaxKernelArgs);

// A piece of a token: lane r knows the row at rank r, lane k the owner and weight of slot k.
struct Piece {
  int32_t row = -1;
  int32_t owner = -1;
  float weight = 0.0f;
  int32_t token = 0;
  int32_t offset = 0, bytes = 0;
};

template <Dtype kDtype>
__device__ __forceinline__ Piece piece_at(const PullKernelArgs& args, int64_t index) {
  const PullArgs& pull = args.pull;
  const int lane = lane_index(), num_ranks = pull.link.num_ranks, topk = pull.dims.topk;
  const int row_bytes = pull.hidden * kElementBytes<kDtype>;
  Piece piece;
  piece.token = static_cast<int32_t>(index / args.shape.pieces);
  piece.offset = static_cast<int32_t>(index % args.shape.pieces) * args.shape.piece_bytes;
  piece.bytes = min(args.shape.piece_bytes, row_bytes - piece.offset);
  if (lane < num_ranks) piece.row = pull.plan.slot[int64_t{piece.token} * num_ranks + lane];
  if (pull.topk_weights != nullptr && lane < topk) {
    const int32_t expert = pull.plan.topk_idx[int64_t{piece.token} * topk + lane];
    piece.weight = pull.topk_weights[int64_t{piece.token} * topk + lane];
    if (expert >= 0) piece.owner = pull.experts.rank[expert];
  }
  return piece;
}

// Where a block finds the rows, in shared memory: row slot[t, r] of rank r at rows[r] + slot * row.
struct RowSources {
  const char* rows[kMaxLinkRanks];
  uint32_t pushed;  // bit r: partial rows of rank r, weights already applied

  // By the first warp.
  __device__ __forceinline__ void fill(const PullArgs& pull, const LinkCall& call,
                                       int64_t row_bytes) {
    const int r = lane_index(), num_ranks = pull.link.num_ranks;
    const bool there = r < num_ranks && call.entry[r].pushed != 0;
    if (there) {
      int64_t before = 0;  // slots at rank r of the tokens of lower ranks
      for (int s = 0; s < pull.link.rank; ++s)
        before += pull.plan.rank_count[int64_t{s} * num_ranks + r];
      rows[r] = pull.staging + (int64_t{r} * pull.max_tokens - before) * row_bytes;
    } else if (r < num_ranks) {
      rows[r] = call.at(pull.link, r, call.entry[r].rows);
    }
    const uint32_t set = __ballot_sync(kFullWarp, there);
    if (r == 0) pushed = set;
  }
};

// Adds what rank r contributes: its row, or the rounded sum over its slots of weight * row.
template <Dtype kDtype>
__device__ __forceinline__ void add_rank(const Piece& piece, int r, bool weighted,
                                         const uint4& vector, float* sum) {
  constexpr int n = kPerVector<kDtype>;
  float x[n];
  vector_to_float<kDtype>(vector, x);
  if (weighted) {
    float partial[n] = {};
    for (uint32_t slots = __ballot_sync(kFullWarp, piece.owner == r); slots != 0;) {
      const float weight = __shfl_sync(kFullWarp, piece.weight, take_lowest(slots));
#pragma unroll
      for (int i = 0; i < n; ++i) partial[i] = __fadd_rn(partial[i], __fmul_rn(weight, x[i]));
    }
    vector_to_float<kDtype>(vector_from_float<kDtype>(partial), x);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) sum[i] = __fadd_rn(sum[i], x[i]);
}

// Sums one piece and stores it. rows(r) gives the address of the piece of rank r.
template <Dtype kDtype, class Rows>
__device__ __forceinline__ void sum_piece(const PullArgs& pull, const Piece& piece, uint32_t pushed,
                                          Rows rows) {
  constexpr int n = kPerVector<kDtype>;
  const int64_t row_bytes = int64_t{pull.hidden} * kElementBytes<kDtype>;
  const int64_t place = piece.token * row_bytes + piece.offset;
  const uint32_t ranks = __ballot_sync(kFullWarp, piece.row >= 0);
  for (int step = 0; step < piece.bytes; step += kStepBytes) {
    const int at = step + lane_index() * kVectorBytes;
    const bool inside = at < piece.bytes;
    float sum[n] = {};
    for (uint32_t rest = ranks; rest != 0;) {
      const int r = take_lowest(rest);
      const char* row = rows(r);
      const uint4 vector = inside ? *reinterpret_cast<const uint4*>(row + at) : uint4{};
      const bool weighted = pull.topk_weights != nullptr && (pushed >> r & 1) == 0;
      add_rank<kDtype>(piece, r, weighted, vector, sum);
    }
    if (!inside) continue;
    if (pull.bias != nullptr) {
      float x[n];
      vector_to_float<kDtype>(load_streaming(static_cast<const char*>(pull.bias) + place + at), x);
#pragma unroll
      for (int i = 0; i < n; ++i) sum[i] = __fadd_rn(sum[i], x[i]);
    }
    *reinterpret_cast<uint4*>(static_cast<char*>(pull.out) + place + at) =
        vector_from_float<kDtype>(sum);
  }
}

// One warp's share of the pieces, number w of `warps`.
template <Dtype kDtype>
__device__ __forceinline__ void pull_rows(const PullKernelArgs& args, const RowSources& sources,
                                          int w, int warps, BulkBarrier* loaded, char* stages) {
  const PullArgs& pull = args.pull;
  const int lane = lane_index(), num_ranks = pull.link.num_ranks;
  const int64_t row_bytes = int64_t{pull.hidden} * kElementBytes<kDtype>;
  const int64_t pieces = int64_t{pull.num_tokens} * args.shape.pieces;
  const int count = static_cast<int>(pieces > w ? (pieces - w + warps - 1) / warps : 0);
  const char* theirs = lane < num_ranks ? sources.rows[lane] : nullptr;
  if (lane == 0)
    for (int s = 0; s < kStages; ++s) barrier_init(loaded + s);
  fence_barrier_init();
  // The entries were acquired by plain loads; the rows are read by bulk loads.
  fence_global_for_bulk();
  __syncwarp();

  Piece ahead[kStages];
  auto stage = [&](int s, int r) { return stages + (s * num_ranks + r) * args.shape.piece_bytes; };
  auto load = [&](int i, int s, Piece& piece) {
    piece = piece_at<kDtype>(args, int64_t{w} + int64_t{i} * warps);
    const int present = __popc(__ballot_sync(kFullWarp, piece.row >= 0));
    if (lane == 0) barrier_expect(loaded + s, static_cast<uint32_t>(present * piece.bytes));
    __syncwarp();
    if (piece.row >= 0)
      bulk_load(stage(s, lane), theirs + piece.row * row_bytes + piece.offset,
                static_cast<uint32_t>(piece.bytes), loaded + s);
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s)
    if (s < count) load(s, s, ahead[s]);
  for (int first = 0; first < count; first += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      const int i = first + s;
      if (i >= count) break;
      constexpr int kBefore = kStages - 1;
      // The stage of the piece before, which all lanes have summed.
      if (i + kBefore < count)
        load(i + kBefore, (s + kBefore) % kStages, ahead[(s + kBefore) % kStages]);
      barrier_wait(loaded + s, static_cast<uint32_t>(i / kStages) & 1);
      sum_piece<kDtype>(pull, ahead[s], sources.pushed, [&](int r) { return stage(s, r); });
      __syncwarp();
    }
  }
}

// The same through registers.
template <Dtype kDtype>
__device__ __forceinline__ void pull_through_registers(const PullKernelArgs& args,
                                                       const RowSources& sources, int w,
                                                       int warps) {
  const PullArgs& pull = args.pull;
  const int64_t row_bytes = int64_t{pull.hidden} * kElementBytes<kDtype>;
  const int64_t pieces = int64_t{pull.num_tokens} * args.shape.pieces;
  for (int64_t p = w; p < pieces; p += warps) {
    const Piece piece = piece_at<kDtype>(args, p);
    sum_piece<kDtype>(pull, piece, sources.pushed, [&](int r) {
      return sources.rows[r] + __shfl_sync(kFullWarp, piece.row, r) * row_bytes + piece.offset;
    });
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 1)
    pull_kernel(const __grid_constant__ PullKernelArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  EPCOMM_SHARED(RowSources, sources);
  EPCOMM_SHARED(BulkBarrier[kMaxWarps * kStages], loaded);
  const LinkArgs& link = args.pull.link;
  const int blocks = static_cast<int>(gridDim.x), warps = static_cast<int>(blockDim.x) / kWarpSize;
  const bool entered = args.pull.pushed ? link_resume(link, call) : link_enter(link, call);
  if (entered && link_pushed(link, call, args.pull.pushed)) {
    if (warp_index() == 0)
      sources.fill(args.pull, call, int64_t{args.pull.hidden} * kElementBytes<kDtype>);
    __syncthreads();
    const int warp = warp_index(), w = warp * blocks + static_cast<int>(blockIdx.x);
    if constexpr (kHasBulkCopies)
      pull_rows<kDtype>(
          args, sources, w, warps * blocks, loaded + warp * kStages,
          dynamic_shared() + warp * kStages * link.num_ranks * args.shape.piece_bytes);
    else
      pull_through_registers<kDtype>(args, sources, w, warps * blocks);
  }
  link_finish(link, call);
}

}  // namespace

void launch_pull(const PullArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.bias, "bias");
  check_aligned(args.out, "out");
  const int row_bytes = args.hidden * dtype_bytes(args.dtype);
  const size_t ranks = static_cast<size_t>(args.link.num_ranks);
  // Half the warps at least, however many ranks there are.
  const size_t room = kSharedBytes / (kStages * ranks * (kMaxWarps / 2));
  const int most =
      static_cast<int>(std::min<size_t>(room, kMaxPieceBytes)) / kStepBytes * kStepBytes;
  PullShape shape;
  shape.piece_bytes = std::max(most, kStepBytes);
  shape.pieces = (row_bytes + shape.piece_bytes - 1) / shape.piece_bytes;
  const size_t per_warp = kStages * ranks * static_cast<size_t>(shape.piece_bytes);
  const int warps = static_cast<int>(
      std::clamp<size_t>(kSharedBytes / per_warp, 1, static_cast<size_t>(kMaxWarps)));
  const bool bulk = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const auto kernel = for_dtype(args.dtype, pull_kernel<Dtype::kBfloat16>,
                                pull_kernel<Dtype::kFloat16>, pull_kernel<Dtype::kFloat32>);
  launch("launch of pull", kernel,
         {persistent_blocks(num_sms), warps * kWarpSize,
          bulk ? static_cast<size_t>(warps) * per_warp : 0},
         stream, PullKernelArgs{args, shape});
}

}  // namespace epcomm
