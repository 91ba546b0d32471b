// Pull: the owner's side of a combine. The owner of a token loads its rows from the windows of the
// ranks that have them, or what a rank has pushed from its own staging, and sums.
//
// Buffers: rank r's rows lie in its window at the offset that it announced, row slot[t, r] for
// token t; what rank r has pushed at staging row r * max_tokens + (index of t among the tokens that
// go to r). topk_weights, plan.topk_idx [T, K] and bias [T, hidden] are this rank's own; out is
// written.
// Launch: num_sms blocks, one per SM. A warp takes whole tokens, or runs of pieces of them: it
// loads a piece of every rank's row into shared memory (lane r that of rank r), kStages pieces
// ahead, and sums what has come. Without bulk copies (before sm_90) it loads through registers.
// Memory order: kernels/link.cuh. The rows are acquired with the entries of their ranks, pushed
// ones with `pushed`; `done` says that they were read.
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
constexpr int kMaxPieceBytes = 4096;
constexpr int kStepBytes = kVectorBytes * kWarpSize;  // a vector of each lane
constexpr int kSteps = 4;                             // that a warp sums at a time
constexpr size_t kSharedBytes = 208 << 10;

struct PullShape {
  int32_t pieces;       // of a row
  int32_t piece_bytes;  // a multiple of kStepBytes; the last may be shorter
  int32_t parts;        // that a token is cut into, a run of pieces each, for one warp
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

// What lanes know of a token, as in Piece.
struct TokenRows {
  int32_t row = -1;
  int32_t expert = -1;
  float weight = 0.0f;

  __device__ __forceinline__ void load(const PullArgs& pull, int64_t token) {
    const int lane = lane_index(), num_ranks = pull.link.num_ranks, topk = pull.dims.topk;
    if (lane < num_ranks) row = pull.plan.slot[token * num_ranks + lane];
    if (pull.topk_weights == nullptr || lane >= topk) return;
    expert = pull.plan.topk_idx[token * topk + lane];
    weight = pull.topk_weights[token * topk + lane];
  }
};

// The pieces of one warp, number w of `warps`, in the order in which it takes them. What is known
// of a token is loaded while the pieces of the one before are worked on.
class PieceSequence {
 public:
  __device__ __forceinline__ PieceSequence(const PullKernelArgs& args, int row_bytes, int w,
                                           int warps)
      : args_(args),
        row_bytes_(row_bytes),
        warps_(warps),
        job_(w - warps),
        jobs_(args.pull.num_tokens * args.shape.parts) {
    if (w < jobs_) next_.load(args.pull, w / args.shape.parts);
    next_job();
  }
  __device__ __forceinline__ bool empty() const { return job_ >= jobs_; }
  // Not to be called when empty.
  __device__ __forceinline__ Piece take() {
    Piece piece = current_;
    piece.offset = at_ * args_.shape.piece_bytes;
    piece.bytes = min(args_.shape.piece_bytes, row_bytes_ - piece.offset);
    if (++at_ == end_) next_job();
    return piece;
  }

 private:
  __device__ __forceinline__ void next_job() {
    const PullArgs& pull = args_.pull;
    const int parts = args_.shape.parts, pieces = args_.shape.pieces;
    job_ += warps_;
    if (job_ >= jobs_) return;
    current_.token = job_ / parts;
    const int part = job_ - current_.token * parts;
    at_ = pieces * part / parts;
    end_ = pieces * (part + 1) / parts;
    current_.row = next_.row;
    current_.weight = next_.weight;
    if (pull.topk_weights != nullptr)
      current_.owner = next_.expert >= 0 ? pull.experts.rank[next_.expert] : -1;
    if (job_ < jobs_ - warps_) next_.load(pull, (job_ + warps_) / parts);
  }

  const PullKernelArgs& args_;
  int row_bytes_, warps_, job_, jobs_;
  int at_ = 0, end_ = 0;
  Piece current_;
  TokenRows next_;
};

// Where a block finds the rows, in shared memory: row slot[t, r] of rank r at rows[r] + slot * row.
struct RowSources {
  const char* rows[kMaxLinkRanks];
  uint32_t weighted;  // bit r: partial rows of rank r, weights already applied

  // By the first warp.
  __device__ __forceinline__ void fill(const PullArgs& pull, const LinkCall& call,
                                       int64_t row_bytes) {
    const int r = lane_index(), num_ranks = pull.link.num_ranks;
    const bool there = r < num_ranks && call.entry[r].pushed != 0;
    if (r == pull.link.rank && pull.own_rows != nullptr) {
      rows[r] = pull.own_rows;
    } else if (there) {
      int64_t before = 0;  // slots at rank r of the tokens of lower ranks
      for (int s = 0; s < pull.link.rank; ++s)
        before += pull.plan.rank_count[int64_t{s} * num_ranks + r];
      rows[r] = pull.staging + (int64_t{r} * pull.max_tokens - before) * row_bytes;
    } else if (r < num_ranks) {
      rows[r] = call.at(pull.link, r, call.entry[r].rows);
    }
    const uint32_t set = __ballot_sync(kFullWarp, there && pull.weighted);
    if (r == 0) weighted = set;
  }
};

// What the lanes of a warp add up: kSteps vectors each.
template <Dtype kDtype>
struct PieceSum {
  static constexpr int n = kPerVector<kDtype>;
  float sum[kSteps][n] = {};

  __device__ __forceinline__ void add(const uint4 (&vectors)[kSteps]) {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      float x[n];
      vector_to_float<kDtype>(vectors[u], x);
#pragma unroll
      for (int i = 0; i < n; ++i) sum[u][i] = __fadd_rn(sum[u][i], x[i]);
    }
  }
  __device__ __forceinline__ uint4 rounded(int u) const {
    return vector_from_float<kDtype>(sum[u]);
  }
};

// Replaces a row of rank r by the rounded sum over that rank's slots of weight * row.
template <Dtype kDtype>
__device__ __forceinline__ void weigh(const Piece& piece, int r, uint4 (&vectors)[kSteps]) {
  constexpr int n = kPerVector<kDtype>;
  PieceSum<kDtype> partial;
  for (uint32_t slots = __ballot_sync(kFullWarp, piece.owner == r); slots != 0;) {
    const float weight = __shfl_sync(kFullWarp, piece.weight, take_lowest(slots));
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      float x[n];
      vector_to_float<kDtype>(vectors[u], x);
#pragma unroll
      for (int i = 0; i < n; ++i)
        partial.sum[u][i] = __fadd_rn(partial.sum[u][i], __fmul_rn(weight, x[i]));
    }
  }
#pragma unroll
  for (int u = 0; u < kSteps; ++u) vectors[u] = partial.rounded(u);
}

// Sums one piece and stores it. rows(r) gives the address of the piece of rank r.
template <Dtype kDtype, class Rows>
__device__ __forceinline__ void sum_piece(const PullArgs& pull, const Piece& piece,
                                          uint32_t weighted, Rows rows) {
  const int64_t row_bytes = int64_t{pull.hidden} * kElementBytes<kDtype>;
  const int64_t place = piece.token * row_bytes + piece.offset;
  const uint32_t ranks = __ballot_sync(kFullWarp, piece.row >= 0);
  for (int begin = lane_index() * kVectorBytes; begin - lane_index() * kVectorBytes < piece.bytes;
       begin += kSteps * kStepBytes) {
    // Of the vectors of all steps, those inside the piece.
    auto each = [&](auto body) {
#pragma unroll
      for (int u = 0; u < kSteps; ++u)
        if (begin + u * kStepBytes < piece.bytes) body(u, begin + u * kStepBytes);
    };
    PieceSum<kDtype> sum;
    for (uint32_t rest = ranks; rest != 0;) {
      const int r = take_lowest(rest);
      const char* row = rows(r);
      uint4 vectors[kSteps] = {};
      each([&](int u, int at) { vectors[u] = *reinterpret_cast<const uint4*>(row + at); });
      if (pull.topk_weights != nullptr && (weighted >> r & 1) == 0)
        weigh<kDtype>(piece, r, vectors);
      sum.add(vectors);
    }
    if (pull.bias != nullptr) {
      uint4 vectors[kSteps] = {};
      const char* bias = static_cast<const char*>(pull.bias) + place;
      each([&](int u, int at) { vectors[u] = load_streaming(bias + at); });
      sum.add(vectors);
    }
    char* out = static_cast<char*>(pull.out) + place;
    each([&](int u, int at) { *reinterpret_cast<uint4*>(out + at) = sum.rounded(u); });
  }
}

// One warp's share of the pieces, number w of `warps`.
template <Dtype kDtype>
__device__ __forceinline__ void pull_rows(const PullKernelArgs& args, const RowSources& sources,
                                          int w, int warps, BulkBarrier* loaded, char* stages) {
  const PullArgs& pull = args.pull;
  const int lane = lane_index(), num_ranks = pull.link.num_ranks;
  const int64_t row_bytes = int64_t{pull.hidden} * kElementBytes<kDtype>;
  const char* theirs = lane < num_ranks ? sources.rows[lane] : nullptr;
  if (lane == 0)
    for (int s = 0; s < kStages; ++s) barrier_init(loaded + s);
  fence_barrier_init();
  // The entries were acquired by plain loads; the rows are read by bulk loads.
  fence_global_for_bulk();
  __syncwarp();

  PieceSequence pieces(args, static_cast<int>(row_bytes), w, warps);
  Piece ahead[kStages];
  int loads = 0;
  auto stage = [&](int s, int r) { return stages + (s * num_ranks + r) * args.shape.piece_bytes; };
  auto load = [&](int s, Piece& piece) {
    if (pieces.empty()) return;
    piece = pieces.take();
    const int present = __popc(__ballot_sync(kFullWarp, piece.row >= 0));
    if (lane == 0) barrier_expect(loaded + s, static_cast<uint32_t>(present * piece.bytes));
    __syncwarp();
    if (piece.row >= 0)
      bulk_load(stage(s, lane), theirs + piece.row * row_bytes + piece.offset,
                static_cast<uint32_t>(piece.bytes), loaded + s);
    ++loads;
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load(s, ahead[s]);
  for (int first = 0; first < loads; first += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (first + s >= loads) break;
      constexpr int kBefore = kStages - 1;
      // The stage of the piece before, which all lanes have summed.
      load((s + kBefore) % kStages, ahead[(s + kBefore) % kStages]);
      barrier_wait(loaded + s, static_cast<uint32_t>(first / kStages) & 1);
      sum_piece<kDtype>(pull, ahead[s], sources.weighted, [&](int r) { return stage(s, r); });
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
  PieceSequence pieces(args, static_cast<int>(row_bytes), w, warps);
  while (!pieces.empty()) {
    const Piece piece = pieces.take();
    sum_piece<kDtype>(pull, piece, sources.weighted, [&](int r) {
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
  const int room = static_cast<int>(kSharedBytes / (kStages * ranks * kMaxWarps));
  PullShape shape;
  shape.piece_bytes = std::clamp(room / kStepBytes * kStepBytes, kStepBytes, kMaxPieceBytes);
  shape.pieces = (row_bytes + shape.piece_bytes - 1) / shape.piece_bytes;
  const size_t per_warp = kStages * ranks * static_cast<size_t>(shape.piece_bytes);
  const int warps = static_cast<int>(
      std::clamp<size_t>(kSharedBytes / per_warp, 1, static_cast<size_t>(kMaxWarps)));
  const int blocks = persistent_blocks(num_sms);
  // A warp takes whole tokens, but no warp much more than another.
  constexpr int kJobsPerWarp = 8;
  shape.parts =
      std::clamp(kJobsPerWarp * warps * blocks / std::max(args.num_tokens, 1), 1, shape.pieces);
  const bool bulk = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const auto kernel = for_dtype(args.dtype, pull_kernel<Dtype::kBfloat16>,
                                pull_kernel<Dtype::kFloat16>, pull_kernel<Dtype::kFloat32>);
  launch("launch of pull", kernel,
         {blocks, warps * kWarpSize, bulk ? static_cast<size_t>(warps) * per_warp : 0}, stream,
         PullKernelArgs{args, shape});
}

}  // namespace epcomm
