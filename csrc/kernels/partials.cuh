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

  /// record: of the token, of MetaLayout; weights: [K] of the token on its source, or null;
  /// only_row: where a token has one row whatever its record says, that row, else -1.
  __device__ __forceinline__ PartialToken(const MetaLayout& meta, void* record,
                                          const float* weights, int32_t only_row)
      : row(-1), weight(0.0f), weighted(weights != nullptr) {
    if (lane_index() < meta.topk) {
      row = meta.row(record, 0)[lane_index()];
      if (weighted) weight = weights[lane_index()];
    }
    if (only_row >= 0) row = only_row;
    summands = weighted ? __ballot_sync(kFullWarp, row >= 0) : distinct_rows(row);
  }
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

/// The partial of the vectors v, v + 32, ... of a token.
template <Dtype kDtype>
__device__ __forceinline__ void sum_rows(const char* x, int64_t row_bytes,
                                         const PartialToken& token, int v, int end, Batch& batch) {
  uint32_t rest = token.summands;
  if (!token.weighted && __popc(rest) == 1) {
    // The row as it is.
    const int32_t row = __shfl_sync(kFullWarp, token.row, take_lowest(rest));
    batch.load(x + row * row_bytes, v, end);
    return;
  }
  Sum<kDtype> sum;
  sum.clear();
  add_rows(x, row_bytes, token, v, end, batch, sum);
  sum.round_to(batch);
}

}  // namespace epcomm
