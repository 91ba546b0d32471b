// Quantisation of the rows of a small batch as they leave: in the registers of the warp that sends
// them (kernels/quant.cuh). The scales of a job are gathered in shared memory, so that they cross
// the link in one piece instead of four bytes at a time.
#pragma once

#include "epcomm/types.h"
#include "kernels/partials.cuh"
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

/// Quantises a sum and stores it as the vectors v, v + 32, ... of a row of kFp8; q, scales: of the
/// row. By all lanes of a warp.
template <Dtype kDtype>
__device__ __forceinline__ void store_sum_fp8(const Sum<kDtype>& sum, char* q, char* scales, int v,
                                              int end) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = v + u * kWarpSize;
    const auto made = quantize_floats<Quant::kFp8, kDtype>(sum.value[u], GlobalScale{});
    if (i >= end) continue;
    store_codes<Quant::kFp8, kDtype>(q, i, made);
    if (stores_scale<Quant::kFp8, kDtype>(i))
      store_scale<Quant::kFp8>(
          scales + group_of<Quant::kFp8, kDtype>(i) * kScaleUnitBytes<Quant::kFp8>, made.scale);
  }
}

/// The vectors v, v + 32, ... of a row that a peer has stored.
template <Dtype kDtype>
struct ArrivedRow {
  Batch batch;

  __device__ __forceinline__ void load(const char* row, int /*hidden*/, int v, int end) {
    batch.load<RowMemory::kArrived>(row, v, end);
  }
  __device__ __forceinline__ void add_to(Sum<kDtype>& sum) const { sum.add(batch); }
};

/// The same of a row of kFp8: hidden codes, then scales.
template <Dtype kDtype>
struct ArrivedFp8 {
  using Lanes = QuantLanes<Quant::kFp8, kDtype>;
  uint32_t codes[kUnroll][2];
  float scale[kUnroll];

  __device__ __forceinline__ void load(const char* row, int hidden, int v, int end) {
    const float* scales = reinterpret_cast<const float*>(row + hidden);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = v + u * kWarpSize;
      if (i >= end) continue;
      if constexpr (Lanes::kCodeBytes == 8) {
        const uint2 pair = reinterpret_cast<const uint2*>(row)[i];
        codes[u][0] = pair.x;
        codes[u][1] = pair.y;
      } else {
        codes[u][0] = reinterpret_cast<const uint32_t*>(row)[i];
      }
      scale[u] = scales[group_of<Quant::kFp8, kDtype>(i)];
    }
  }
  __device__ __forceinline__ void add_to(Sum<kDtype>& sum) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < Lanes::kElements; i += 2) {
        float x[2];
        e4m3_pair_to_float(codes[u][i / 4] >> (8 * (i % 4)) & 0xffff, x);
        sum.value[u][i] = add_rn(sum.value[u][i], mul_rn(x[0], scale[u]));
        sum.value[u][i + 1] = add_rn(sum.value[u][i + 1], mul_rn(x[1], scale[u]));
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
