// Sums of rows, as all kernels of a combine make them: in fp32, from 0, in the order that
// Buffer::combine documents; a product is rounded before it is added. Every transport so gives the
// same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "epcomm/types.h"
#include "kernels/device.cuh"
#include "kernels/elements.cuh"
#include "kernels/rows.cuh"
#include "kernels/token_layout.h"

namespace epcomm {

/// fp32 sums of the elements that a lane holds at a time, in the places of a Batch.
template <Dtype kDtype>
struct Sum {
  static constexpr int kElements = kPerVector<kDtype>;
  float value[kUnroll][kElements];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kElements; ++i) value[u][i] = 0.0f;
  }
  __device__ __forceinline__ void add(const Batch& batch) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kElements];
      vector_to_float<kDtype>(batch.data[u], x);
#pragma unroll
      for (int i = 0; i < kElements; ++i) value[u][i] = __fadd_rn(value[u][i], x[i]);
    }
  }
  __device__ __forceinline__ void add_weighted(const Batch& batch, float weight) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kElements];
      vector_to_float<kDtype>(batch.data[u], x);
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        value[u][i] = __fadd_rn(value[u][i], __fmul_rn(weight, x[i]));
    }
  }
  __device__ __forceinline__ void round_to(Batch& batch) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) batch.data[u] = vector_from_float<kDtype>(value[u]);
  }
};

/// One lane's view of a received token: lane k holds slot k.
struct PartialToken {
  int32_t row;
  float weight;
  uint32_t summands;  ///< slots whose rows add up to the partial; the same in all lanes
  bool weighted;

  /// record: of the token, of MetaLayout; rows from row_capacity on do not exist; weights: [K] of
  /// the token on its source, or null; only_row: where a token has one row whatever its record
  /// says, that row, else -1.
  __device__ __forceinline__ PartialToken(const MetaLayout& meta, void* record,
                                          int32_t row_capacity, const float* weights,
                                          int32_t only_row)
      : row(-1), weight(0.0f), weighted(weights != nullptr) {
    if (lane_index() < meta.topk) {
      row = meta.row(record, 0)[lane_index()];
      if (row >= row_capacity) row = -1;
      if (weighted && row >= 0) weight = weights[lane_index()];
    }
    if (only_row >= 0) row = only_row;
    summands = weighted ? __ballot_sync(kFullWarp, row >= 0) : distinct_rows(row);
  }
  /// row, weight: of the lane's slot.
  __device__ __forceinline__ PartialToken(int32_t row_, float weight_, bool weighted_)
      : row(row_), weight(weight_), weighted(weighted_) {
    summands = weighted ? __ballot_sync(kFullWarp, row >= 0) : distinct_rows(row);
  }
  /// Whether the partial is a row as it is.
  __device__ __forceinline__ bool is_one_row() const { return !weighted && __popc(summands) == 1; }
  /// Of the lane's slot; for k the same in all lanes.
  __device__ __forceinline__ int32_t row_of(int k) const { return __shfl_sync(kFullWarp, row, k); }
};

/// Adds the rows of the vectors v, v + 32, ... of a token; batch holds what was read last.
template <Dtype kDtype>
__device__ __forceinline__ void add_rows(const char* x, int64_t row_bytes,
                                         const PartialToken& token, int v, int end, Batch& batch,
                                         Sum<kDtype>& sum) {
  int32_t loaded = -1;  // in layout kToken all slots have one row, which is read once
  for (uint32_t rest = token.summands; rest != 0;) {
    const int k = take_lowest(rest);
    const int32_t row = __shfl_sync(kFullWarp, token.row, k);
    if (row != loaded) batch.load(x + row * row_bytes, v, end);
    loaded = row;
    if (token.weighted)
      sum.add_weighted(batch, __shfl_sync(kFullWarp, token.weight, k));
    else
      sum.add(batch);
  }
}

/// As add_rows, for kernels with room for several rows in registers: kRows are on their way at a
/// time, and a sum of few rows takes the time of one load. kWeighted: token.weighted.
template <int kRows, bool kWeighted, Dtype kDtype>
__device__ __forceinline__ void add_rows_at_once(const char* x, int64_t row_bytes,
                                                 const PartialToken& token, int v, int end,
                                                 Sum<kDtype>& sum) {
  for (uint32_t rest = token.summands; rest != 0;) {
    Batch batch[kRows] = {};  // so that none lives from one round to the next
    float weight[kRows];
    const int rows = min(__popc(rest), kRows);
    int64_t row[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int k = i < rows ? take_lowest(rest) : 0;
      row[i] = token.row_of(k);
      if constexpr (kWeighted) weight[i] = __shfl_sync(kFullWarp, token.weight, k);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) batch[i].load(x + row[i] * row_bytes, v, i < rows ? end : 0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) continue;
      if constexpr (kWeighted)
        sum.add_weighted(batch[i], weight[i]);
      else
        sum.add(batch[i]);
    }
  }
}

/// The partial of the vectors v, v + 32, ... of a token.
template <Dtype kDtype>
__device__ __forceinline__ void sum_rows(const char* x, int64_t row_bytes,
                                         const PartialToken& token, int v, int end, Batch& batch) {
  if (token.is_one_row()) {
    uint32_t rest = token.summands;
    batch.load(x + token.row_of(take_lowest(rest)) * row_bytes, v, end);
    return;
  }
  Sum<kDtype> sum;
  sum.clear();
  add_rows(x, row_bytes, token, v, end, batch, sum);
  sum.round_to(batch);
}

}  // namespace epcomm
