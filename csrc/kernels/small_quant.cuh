// Quantisation of the rows of a small batch as they leave: in the registers of the warp that sends
// them (kernels/quant.cuh). The scales of a job are gathered in shared memory, so that they cross
// the link in one piece instead of four bytes at a time.
#pragma once

#include "epcomm/types.h"
#include "kernels/quant.cuh"
#include "kernels/rows.cuh"

namespace epcomm {

constexpr int kJobScaleBytes = 512;  ///< most scales of one job
/// Shared memory of a warp: the scales of a job, and what finish_scales adds behind the last.
constexpr int kStagedScaleBytes = kJobScaleBytes + 32;

/// Parts that a row must be cut into at least, so that the scales of each fit.
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ int least_quant_parts(int row_vectors) {
  constexpr int kUnitBytes =
      kWarpSize / QuantLanes<kQuant, kDtype>::kLanes * kScaleUnitBytes<kQuant>;
  constexpr int kMostVectors = kJobScaleBytes / kUnitBytes * kWarpSize;
  static_assert(kUnitBytes * 32 <= kJobScaleBytes);
  return (row_vectors + kMostVectors - 1) / kMostVectors;
}

/// A Batch of a row, quantised. All functions by all lanes of a warp; v: vector of lane 0, a
/// multiple of 32, plus the lane.
template <Quant kQuant, Dtype kDtype>
struct QuantBatch {
  QuantVector made[kUnroll];

  __device__ __forceinline__ QuantBatch(const Batch& batch, const GlobalScale& global) {
    quantize_vectors<kQuant, kDtype>(batch.data, global, made);
  }
  /// q: codes of the row.
  __device__ __forceinline__ void store(char* q, int v, int end) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (v + u * kWarpSize < end) store_codes<kQuant, kDtype>(q, v + u * kWarpSize, made[u]);
  }
  /// scales: of the row.
  __device__ __forceinline__ void store_scales(char* scales, int v, int end) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = v + u * kWarpSize;
      if (i < end && stores_scale<kQuant, kDtype>(i))
        store_scale<kQuant>(scales + group_of<kQuant, kDtype>(i) * kScaleUnitBytes<kQuant>,
                            made[u].scale);
    }
  }
};

/// Where the scales of a job are in a row of scales as a dispatch moves it.
struct ScaleRange {
  int begin, bytes;

  template <Quant kQuant, Dtype kDtype>
  static __device__ __forceinline__ ScaleRange of(const RowJob& job, int row_vectors,
                                                  const QuantLayout& layout) {
    const int begin = group_of<kQuant, kDtype>(job.begin) * kScaleUnitBytes<kQuant>;
    const int end = job.end == row_vectors
                        ? layout.wire_scale_bytes
                        : group_of<kQuant, kDtype>(job.end) * kScaleUnitBytes<kQuant>;
    return {begin, end - begin};
  }
};

}  // namespace epcomm
