// Pull: a combine. The owner of a token loads its rows from the windows of the ranks that have
// them, or what a rank pushes (kernels/push.cuh) from its own staging, as it arrives, and sums.
//
// Buffers: rank r's rows lie in its window at the offset that it announced, row slot[t, r] for
// token t; what rank r pushes at staging row r * max_tokens + (index of t among the tokens that go
// to r). topk_weights, plan.topk_idx [T, K] and bias [T, hidden] are this rank's own; out is
// written.
// Launch: num_sms blocks, one per SM. A warp takes whole tokens, or runs of pieces of them: it
// loads a piece of every rank's row into shared memory (lane r that of rank r), kStages pieces
// ahead, and sums what has come. Without bulk copies (before sm_90) it loads through registers.
// Pushing: the blocks that start first push, so that a block which waits for rows never keeps one
// from its SM that pushes; the others sum from the start, in the order of tokens. If any rank
// pushes, jobs go to whoever comes for them, and each block's last warp follows what arrives.
// Memory order: kernels/link.cuh. The rows are acquired with the entries of their ranks, pushed
// ones as kernels/arrivals.cuh says, partial ones with `pushed`; `done` says that they were read.
#include <algorithm>

#include "kernels/arrivals.cuh"
#include "kernels/device.cuh"
#include "kernels/elements.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/piece_numbers.cuh"
#include "kernels/push.cuh"
#include "kernels/rows.cuh"

namespace epcomm {
namespace {

constexpr int kStages = 3;
constexpr int kMaxWarps = 8;
constexpr int kMaxPieceBytes = 4096;
constexpr int kStepBytes = kVectorBytes * kWarpSize;  // a vector of each lane
constexpr int kSteps = 4;                             // that a warp sums at a time
constexpr size_t kSharedBytes = 208 << 10;
static_assert(kPushSharedBytes <= kSharedBytes && kPushWarps <= kMaxWarps);

// How a block is divided, and tokens cut; the host and the kernel agree on it.
struct PullShape {
  int32_t warps;        // that sum; one more tells, or follows, what arrives
  int32_t pushers;      // blocks that push
  int32_t push_warps;   // of each
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

// The pieces of one warp, number w of `warps`, in the order in which it takes them: of equal
// shares, or `dealt` to whoever comes. What is known of a token is loaded while the pieces of the
// one before are worked on.
class PieceSequence {
 public:
  __device__ __forceinline__ PieceSequence(const PullKernelArgs& args, int row_bytes, int w,
                                           int warps, bool dealt)
      : args_(args),
        row_bytes_(row_bytes),
        warps_(warps),
        following_(w),
        jobs_(args.pull.num_tokens * args.shape.parts),
        dealt_(dealt),
        numbers_(args.pull.link.state->taken, 0, 0, dealt ? jobs_ : 0) {
    look_ahead();
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
  __device__ __forceinline__ void look_ahead() {
    next_job_ = dealt_ ? numbers_.take() : following_;
    if (next_job_ < jobs_) next_.load(args_.pull, next_job_ / args_.shape.parts);
    if (next_job_ < jobs_) following_ += warps_;
  }
  __device__ __forceinline__ void next_job() {
    const PullArgs& pull = args_.pull;
    const int parts = args_.shape.parts, pieces = args_.shape.pieces;
    job_ = next_job_;
    if (job_ >= jobs_) return;
    current_.token = job_ / parts;
    const int part = job_ - current_.token * parts;
    at_ = pieces * part / parts;
    end_ = pieces * (part + 1) / parts;
    current_.row = next_.row;
    current_.weight = next_.weight;
    if (pull.topk_weights != nullptr)
      current_.owner = next_.expert >= 0 ? pull.experts.rank[next_.expert] : -1;
    look_ahead();
  }

  const PullKernelArgs& args_;
  int row_bytes_, warps_, following_, jobs_;
  bool dealt_;
  PieceNumbers<0> numbers_;
  int job_ = 0, next_job_ = 0;
  int at_ = 0, end_ = 0;
  Piece current_;
  TokenRows next_;
};

// Where a block finds the rows, in shared memory: row slot[t, r] of rank r at rows[r] + slot * row.
struct RowSources {
  const char* rows[kMaxLinkRanks];
  uint32_t weighted;  // bit r: partial rows of rank r, weights already applied
  uint32_t arriving;  // bit r: rows of rank r are pushed meanwhile
  bool dealt;         // jobs go to whoever comes for them

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
    const uint32_t applied = __ballot_sync(kFullWarp, there && pull.partials);
    const uint32_t pushed = __ballot_sync(kFullWarp, there && call.entry[r].senders != 0);
    if (r != 0) return;
    weighted = applied;
    arriving = pushed & ~(1u << pull.link.rank);
    dealt = pushed != 0;
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

// One warp's share of the pieces, number w of `warps`. here: where rows are waited for.
template <Dtype kDtype>
__device__ __forceinline__ void pull_rows(const PullKernelArgs& args, const RowSources& sources,
                                          const Arrivals& here, int w, int warps,
                                          BulkBarrier* loaded, char* stages) {
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

  ArrivedRows arrived(here, sources.arriving);
  PieceSequence pieces(args, static_cast<int>(row_bytes), w, warps, sources.dealt);
  Piece ahead[kStages];
  int loads = 0;
  bool lost = false;  // rows that do not come: nothing more is taken
  auto stage = [&](int s, int r) { return stages + (s * num_ranks + r) * args.shape.piece_bytes; };
  auto load = [&](int s, Piece& piece) {
    if (lost || pieces.empty()) return;
    piece = pieces.take();
    lost = !arrived.wait(piece.row);
    if (lost) return;
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
                                                       const RowSources& sources,
                                                       const Arrivals& here, int w, int warps) {
  const PullArgs& pull = args.pull;
  const int64_t row_bytes = int64_t{pull.hidden} * kElementBytes<kDtype>;
  ArrivedRows arrived(here, sources.arriving);
  PieceSequence pieces(args, static_cast<int>(row_bytes), w, warps, sources.dealt);
  while (!pieces.empty()) {
    const Piece piece = pieces.take();
    if (!arrived.wait(piece.row)) return;
    sum_piece<kDtype>(pull, piece, sources.weighted, [&](int r) {
      return sources.rows[r] + __shfl_sync(kFullWarp, piece.row, r) * row_bytes + piece.offset;
    });
  }
}

// What a block of a rank that pushes does first: its share, if it has one.
__device__ __forceinline__ void push_first(const PullKernelArgs& args, const LinkCall& call,
                                           int64_t row_bytes, SentTokens& sent,
                                           BulkBarrier* loaded) {
  EPCOMM_SHARED(PushRuns, runs);
  sent.clear();
  if (warp_index() == 0) runs.fill(args.pull, row_bytes);
  __syncthreads();
  push_share(args.pull, call, runs, args.shape.pushers, args.shape.push_warps, row_bytes, sent,
             loaded);
  // What was pushed does not use shared memory any more, which bulk loads fill now.
  if constexpr (kHasBulkCopies) fence_shared_for_bulk();
  __syncthreads();
}

// A block's share of the sums.
template <Dtype kDtype>
__device__ __forceinline__ void sum_share(const PullKernelArgs& args, const LinkCall& call,
                                          RowSources& sources, Arrivals& here,
                                          BulkBarrier* loaded) {
  const PullArgs& pull = args.pull;
  const LinkArgs& link = pull.link;
  const int warp = warp_index(), warps = args.shape.warps, blocks = static_cast<int>(gridDim.x);
  if (warp == 0) sources.fill(pull, call, int64_t{pull.hidden} * kElementBytes<kDtype>);
  __syncthreads();
  if (sources.dealt) {
    here.fill(link, args.shape.pushers, [&](int s) -> SourceTokens {
      if ((sources.arriving >> s & 1) == 0) return {0, 0};
      int32_t first = 0;
      for (int i = 0; i < link.rank; ++i) first += pull.plan.rank_count[i * link.num_ranks + s];
      return {first, pull.plan.rank_count[link.rank * link.num_ranks + s]};
    });
    if (here.may_wait == 0) return;  // blocks that start later do it
    if (warp == static_cast<int>(blockDim.x) / kWarpSize - 1)
      return watch_arrivals(link, pull.arrivals, call, here);
  }
  if (warp >= warps) return;
  const int w = warp * blocks + static_cast<int>(blockIdx.x);
  if constexpr (kHasBulkCopies)
    pull_rows<kDtype>(args, sources, here, w, warps * blocks, loaded + warp * kStages,
                      dynamic_shared() + warp * kStages * link.num_ranks * args.shape.piece_bytes);
  else
    pull_through_registers<kDtype>(args, sources, here, w, warps * blocks);
}

template <Dtype kDtype>
__global__ void __launch_bounds__((kMaxWarps + 1) * kWarpSize, 1)
    pull_kernel(const __grid_constant__ PullKernelArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  EPCOMM_SHARED(RowSources, sources);
  EPCOMM_SHARED(BulkBarrier[kMaxWarps * kStages], loaded);
  EPCOMM_SHARED(BulkBarrier[kPushWarps * kPushStages], push_loaded);
  EPCOMM_SHARED(SentTokens, sent);
  EPCOMM_SHARED(Arrivals, here);
  const PullArgs& pull = args.pull;
  const LinkArgs& link = pull.link;
  const bool pushes = args.shape.pushers != 0;
  const bool agreed = pull.partials
                          ? link_resume(link, call) && link_pushed(link, call)
                          : link_enter(link, call, nullptr, 0, 0,
                                       pushes ? BlockOrder::kStarted : BlockOrder::kIndex);
  if (agreed) {
    if (call.block < args.shape.pushers)
      push_first(args, call, int64_t{pull.hidden} * kElementBytes<kDtype>, sent, push_loaded);
    sum_share<kDtype>(args, call, sources, here, loaded);
  }
  link_finish(link, call);
}

}  // namespace

void launch_pull(const PullArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.own_rows, "x");
  check_aligned(args.bias, "bias");
  check_aligned(args.out, "out");
  const int row_bytes = args.hidden * dtype_bytes(args.dtype);
  const size_t ranks = static_cast<size_t>(args.link.num_ranks);
  const int room = static_cast<int>(kSharedBytes / (kStages * ranks * kMaxWarps));
  PullKernelArgs kernel{args, {}};
  PullShape& shape = kernel.shape;
  shape.piece_bytes = std::clamp(room / kStepBytes * kStepBytes, kStepBytes, kMaxPieceBytes);
  shape.pieces = (row_bytes + shape.piece_bytes - 1) / shape.piece_bytes;
  const size_t per_warp = kStages * ranks * static_cast<size_t>(shape.piece_bytes);
  shape.warps = static_cast<int32_t>(
      std::clamp<size_t>(kSharedBytes / per_warp, 1, static_cast<size_t>(kMaxWarps)));
  const int blocks = persistent_blocks(num_sms);
  // A warp takes whole tokens, but no warp much more than another.
  constexpr int kJobsPerWarp = 8;
  const int jobs = kJobsPerWarp * shape.warps * blocks;
  shape.parts = std::clamp(jobs / std::max(args.num_tokens, 1), 1, shape.pieces);
  const bool bulk = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  size_t stages = static_cast<size_t>(shape.warps) * per_warp;
  int warps = shape.warps;
  if (args.own_rows != nullptr) {
    shape.pushers = std::min((blocks + 1) / 2, args.most_senders);
    kernel.pull.link.entry.senders = shape.pushers;
    warps = std::max(warps, kPushWarps);
    shape.push_warps = bulk ? kPushWarps : warps;
    stages = std::max(stages, kPushSharedBytes);
    // What is left to sum when the last rows have arrived is what each warp has taken by then.
    constexpr int kLeastParts = 4;
    shape.parts = std::clamp(shape.parts, std::min(kLeastParts, shape.pieces), shape.pieces);
  }
  const auto pull = for_dtype(args.dtype, pull_kernel<Dtype::kBfloat16>,
                              pull_kernel<Dtype::kFloat16>, pull_kernel<Dtype::kFloat32>);
  launch("launch of pull", pull, {blocks, (warps + 1) * kWarpSize, bulk ? stages : 0}, stream,
         kernel);
}

}  // namespace epcomm
