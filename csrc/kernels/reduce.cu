// Reduce: the sums of a combine. partials: on the expert side, one row per token and source rank.
// sum: on the owner's side, the rows of all ranks and the bias. finish: the same end where a
// reduce-scatter has summed.
//
// Buffers: partials reads x (rows of the layout), plan.recv_meta, plan.rank_count and the weights
// of all sources, and writes target[s] (or the dense fp32 rows). sum reads partial[r], plan.slot,
// plan.rank_count and bias, and writes out.
// Launch: one block per SM; a warp takes a part of a row and reads the rows that add up to it one
// after another. finish: a grid-stride loop over vectors.
// Memory order: none between threads, each byte is written by one. Rows have arrived before the
// kernel starts; a target in memory of a peer is released by whoever signals that peer afterwards.
#include <algorithm>

#include "kernels/device.cuh"
#include "kernels/elements.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/mark.cuh"
#include "kernels/partials.cuh"
#include "kernels/rows.cuh"

namespace epcomm {
namespace {

static_assert(sizeof(PartialArgs) <= kMaxKernelArgs && sizeof(SumArgs) <= kMaxKernelArgs);

// Where dense partials go; row null: not dense.
struct DenseTarget {
  float* rows;
  int32_t capacity;  // tokens between sources
};

// Stores n = 4 or 8 floats at an address that is a multiple of 16.
template <int n>
__device__ __forceinline__ void store_floats(float* to, const float* x) {
#pragma unroll
  for (int i = 0; i < n; i += 4)
    *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}

template <Dtype kDtype>
__device__ __forceinline__ void store_dense(const Batch& batch, float* row, int v, int end) {
  constexpr int n = kPerVector<kDtype>;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (v + u * kWarpSize >= end) continue;
    float x[n];
    vector_to_float<kDtype>(batch.data[u], x);
    store_floats<n>(row + int64_t{v + u * kWarpSize} * n, x);
  }
}

template <Dtype kDtype, bool kDense>
__global__ void __launch_bounds__(kRowThreads, 1)
    partials_kernel(const __grid_constant__ PartialArgs args, const DenseTarget dense) {
  EPCOMM_SHARED(SourceRanges, ranges);
  make_mark(args.mark);
  const int num_ranks = args.dims.num_ranks, topk = args.dims.topk, lane = lane_index();
  ranges.fill(num_ranks, [&](int s) {
    SourceCount count = chunk_of_source(args, s);
    if ((args.sources >> s & 1) == 0) count.taken = 0;
    return count;
  });

  const MetaLayout meta(topk);
  const int row_bytes = args.hidden * kElementBytes<kDtype>;
  // A row of each source in turn, those of the next rank first: no owner is written to by all ranks
  // at once.
  const RowJobs jobs(num_ranks * ranges.longest(num_ranks), row_bytes);
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int i = job.row / num_ranks, s = (args.rank + 1 + job.row - i * num_ranks) % num_ranks;
    const int position = ranges.begin(s) + i;
    if (position >= ranges.end[s]) continue;
    const int32_t n = position + ranges.to_recv[s];
    void* record = meta.row(args.plan.recv_meta, n);
    const int64_t t = *meta.token(record, 0);
    if (t < 0 || t >= args.max_tokens) continue;
    const float* weights = args.topk_weights[s];
    const PartialToken token(meta, record, args.row_capacity,
                             weights == nullptr ? nullptr : weights + t * topk,
                             args.by_token ? n : -1);
    for (int at = job.begin; at < job.end; at += Batch::kStep) {
      const int v = at + lane;
      Batch batch = {};
      sum_rows<kDtype>(args.x, row_bytes, token, v, job.end, batch);
      if constexpr (kDense)
        store_dense<kDtype>(batch, dense.rows + (int64_t{s} * dense.capacity + t) * args.hidden, v,
                            job.end);
      else
        batch.store(args.target[s] + (int64_t{position} + ranges.to_source[s]) * row_bytes, v,
                    job.end);
    }
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kRowThreads, 1) sum_kernel(const __grid_constant__ SumArgs args) {
  EPCOMM_SHARED(int32_t[kMaxPackRanks], sent_before);
  make_mark(args.mark);
  const int num_ranks = args.dims.num_ranks, lane = lane_index();
  count_sent_before(sent_before, args.plan.rank_count, num_ranks, args.rank);

  const int64_t begin = chunk_begin(args.num_tokens, args.chunks, args.chunk);
  const int64_t end = chunk_begin(args.num_tokens, args.chunks, args.chunk + 1);
  const int64_t row_bytes = int64_t{args.hidden} * kElementBytes<kDtype>;
  const char* bias = static_cast<const char*>(args.bias);
  char* out = static_cast<char*>(args.out);
  const RowJobs jobs(static_cast<int>(end - begin), static_cast<int>(row_bytes));
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int64_t t = begin + job.row;
    const TokenRanks token_ranks(args.plan.slot + t * num_ranks, sent_before, num_ranks);
    const uint64_t ranks = token_ranks.ranks();
    for (int at = job.begin; at < job.end; at += Batch::kStep) {
      const int v = at + lane;
      Batch batch;
      Sum<kDtype> sum;
      sum.clear();
      for (uint64_t rest = ranks; rest != 0;) {
        const int r = take_lowest(rest);
        batch.load(args.partial[r] + token_ranks.index(r) * row_bytes, v, job.end);
        sum.add(batch);
      }
      if (bias != nullptr) {
        batch.load(bias + t * row_bytes, v, job.end);
        sum.add(batch);
      }
      sum.round_to(batch);
      batch.store(out + t * row_bytes, v, job.end);
    }
  }
}

struct FinishArgs {
  const char* sum;
  const char* bias;
  char* out;
  int64_t num_vectors;
};

template <Dtype kDtype>
__global__ void __launch_bounds__(256) finish_kernel(const FinishArgs args) {
  constexpr int n = kPerVector<kDtype>;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t v = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; v < args.num_vectors;
       v += step) {
    float x[n], y[n];
#pragma unroll
    for (int i = 0; i < n; i += 4)
      vector_to_float<Dtype::kFloat32>(
          load_streaming(args.sum + (v * n + i) * static_cast<int64_t>(sizeof(float))), x + i);
    // As elsewhere the sum starts at 0: -0 alone becomes 0.
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = __fadd_rn(0.0f, x[i]);
    if (args.bias != nullptr) {
      vector_to_float<kDtype>(load_streaming(args.bias + v * kVectorBytes), y);
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = __fadd_rn(x[i], y[i]);
    }
    *reinterpret_cast<uint4*>(args.out + v * kVectorBytes) = vector_from_float<kDtype>(x);
  }
}

}  // namespace

void launch_partials(const PartialArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.x, "x");
  const auto kernel =
      for_dtype(args.dtype, partials_kernel<Dtype::kBfloat16, false>,
                partials_kernel<Dtype::kFloat16, false>, partials_kernel<Dtype::kFloat32, false>);
  launch("launch of partials", kernel, {persistent_blocks(num_sms), kRowThreads}, stream, args,
         DenseTarget{});
}

void launch_dense_partials(const PartialArgs& args, float* dense, int capacity, int num_sms,
                           cudaStream_t stream) {
  check_aligned(args.x, "x");
  check_aligned(dense, "dense partials");
  PartialArgs whole = args;
  whole.chunk = 0;
  whole.chunks = 1;
  const auto kernel =
      for_dtype(args.dtype, partials_kernel<Dtype::kBfloat16, true>,
                partials_kernel<Dtype::kFloat16, true>, partials_kernel<Dtype::kFloat32, true>);
  launch("launch of dense_partials", kernel, {persistent_blocks(num_sms), kRowThreads}, stream,
         whole, DenseTarget{dense, capacity});
}

void launch_finish(const float* sum, const void* bias, void* out, Dtype dtype, int64_t num_elements,
                   cudaStream_t stream) {
  check_aligned(sum, "sum");
  check_aligned(bias, "bias");
  check_aligned(out, "out");
  const auto kernel = for_dtype(dtype, finish_kernel<Dtype::kBfloat16>,
                                finish_kernel<Dtype::kFloat16>, finish_kernel<Dtype::kFloat32>);
  const int64_t vectors = num_elements * dtype_bytes(dtype) / kVectorBytes;
  if (vectors == 0) return;
  constexpr int kThreads = 256;
  const int64_t blocks =
      std::min<int64_t>((vectors + kThreads - 1) / kThreads, 8 * persistent_blocks(0));
  launch("launch of finish", kernel, {static_cast<int>(blocks), kThreads}, stream,
         FinishArgs{reinterpret_cast<const char*>(sum), static_cast<const char*>(bias),
                    static_cast<char*>(out), vectors});
}

void launch_sum(const SumArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.bias, "bias");
  check_aligned(args.out, "out");
  const auto kernel = for_dtype(args.dtype, sum_kernel<Dtype::kBfloat16>,
                                sum_kernel<Dtype::kFloat16>, sum_kernel<Dtype::kFloat32>);
  if (chunk_begin(args.num_tokens, args.chunks, args.chunk) ==
      chunk_begin(args.num_tokens, args.chunks, args.chunk + 1)) {
    launch_mark(args.mark, stream);
    return;
  }
  launch("launch of sum", kernel, {persistent_blocks(num_sms), kRowThreads}, stream, args);
}

}  // namespace epcomm
