// Quantisation of the rows of a small batch as they leave: in the registers of the warp that sends
// them (kernels/quant.cuh). The scales of a job are gathered in shared memory, so that they cross
// the link in one piece instead of four bytes at a time.
#pragma once

#include "epcomm/types.h"
#include "kernels/partials.cuh"
#include "kernels/quant.cuh"
#include "kernels/rows.cuh"
#include "kernels/small_staging.cuh"

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
  /// q: codes of the row. In words of 4 bytes at least: a receiver may take each when it has come.
  __device__ __forceinline__ void store(char* q, int v, int end) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = v + u * kWarpSize;
      if constexpr (QuantLanes<kQuant, kDtype>::kCodeBytes == 2) {
        const uint32_t next = __shfl_down_sync(kFullWarp, made[u].codes[0], 1);
        if (i < end && i % 2 == 0)
          reinterpret_cast<uint32_t*>(q)[i / 2] = (made[u].codes[0] & 0xffff) | next << 16;
      } else if (i < end) {
        store_codes<kQuant, kDtype>(q, i, made[u]);
      }
    }
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

/// The vectors v, v + 32, ... of a row that a peer stores.
template <Dtype kDtype>
struct ArrivedRow {
  Batch batch;

  // All functions by a warp.
  __device__ __forceinline__ void load(const char* row, int /*hidden*/, int v, int end) {
    batch.load<RowMemory::kArriving>(row, v, end);
  }
  /// Whether all that was loaded has been written.
  __device__ __forceinline__ bool is_there(int v, int end) const {
    return batch.all(v, end, is_written);
  }
  /// The word of the vectors below end that is stored last.
  static __device__ __forceinline__ const uint32_t* last(const char* row, int /*hidden*/, int end) {
    return reinterpret_cast<const uint32_t*>(row + int64_t{end} * kVectorBytes) - 1;
  }
  static __device__ __forceinline__ void unwrite(char* row, int /*hidden*/, int v, int end) {
    Batch::fill(row, v, end, unwritten_vector());
  }
  __device__ __forceinline__ void add_to(Sum<kDtype>& sum) const { sum.add(batch); }
};

/// The same of a row of kFp8: hidden codes, then scales.
template <Dtype kDtype>
struct ArrivedFp8 {
  using Lanes = QuantLanes<Quant::kFp8, kDtype>;
  static constexpr int kCodeWords = Lanes::kCodeBytes / 4;
  uint32_t codes[kUnroll][2];
  uint32_t scale[kUnroll];  // bits of a float

  __device__ __forceinline__ void load(const char* row, int hidden, int v, int end) {
    const auto* words = reinterpret_cast<const uint32_t*>(row);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = v + u * kWarpSize;
#pragma unroll
      for (int w = 0; w < kCodeWords; ++w)
        load_relaxed_system_if(i < end, codes[u][w], words + i * kCodeWords + w);
      load_relaxed_system_if(i < end, scale[u],
                             words + hidden / 4 + group_of<Quant::kFp8, kDtype>(i));
    }
  }
  __device__ __forceinline__ bool is_there(int v, int end) const {
    bool there = true;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      bool written = scale[u] != SmallLayout::kUnwritten;
#pragma unroll
      for (int w = 0; w < kCodeWords; ++w) written &= codes[u][w] != SmallLayout::kUnwritten;
      there &= written || v + u * kWarpSize >= end;
    }
    return there;
  }
  static __device__ __forceinline__ const uint32_t* last(const char* row, int hidden, int end) {
    return reinterpret_cast<const uint32_t*>(row) + hidden / 4 +
           group_of<Quant::kFp8, kDtype>(end - 1);
  }
  static __device__ __forceinline__ void unwrite(char* row, int hidden, int v, int end) {
    auto* words = reinterpret_cast<uint32_t*>(row);
    __syncwarp();  // lanes share scales
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = v + u * kWarpSize;
      if (i >= end) continue;
#pragma unroll
      for (int w = 0; w < kCodeWords; ++w) words[i * kCodeWords + w] = SmallLayout::kUnwritten;
      words[hidden / 4 + group_of<Quant::kFp8, kDtype>(i)] = SmallLayout::kUnwritten;
    }
  }
  __device__ __forceinline__ void add_to(Sum<kDtype>& sum) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float factor = __uint_as_float(scale[u]);
#pragma unroll
      for (int i = 0; i < Lanes::kElements; i += 2) {
        float x[2];
        e4m3_pair_to_float(codes[u][i / 4] >> (8 * (i % 4)) & 0xffff, x);
        sum.value[u][i] = add_rn(sum.value[u][i], mul_rn(x[0], factor));
        sum.value[u][i + 1] = add_rn(sum.value[u][i + 1], mul_rn(x[1], factor));
      }
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
