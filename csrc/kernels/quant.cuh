// Quantisation in registers, for kernels that move rows: the formats of kernels/quant.h, with the
// same bits.
//
// Contract: a row is cut into 16-byte vectors, and lane l of a warp holds vector v + l of it, v a
// multiple of 32 (from global or shared memory; zeros beyond the end of the row). All 32 lanes call
// quantize_vector(s) together: kLanes neighbours share a group and find its amax by shuffles. Each
// gets the codes of its own elements (kCodeBytes, for store_codes) and the scale of its group,
// which one lane of the group stores (stores_scale, store_scale). No shared memory, no barrier.
// After the last vector of a row the warp calls finish_scales, for the bytes of a row of scales
// that belong to no group.
#pragma once

#include <cuda_runtime.h>
#ifdef __CUDACC__
#include <cuda_fp8.h>
#endif

#include <cstdint>

#include "epcomm/types.h"
#include "kernels/device.cuh"
#include "kernels/elements.cuh"
#include "kernels/quant.h"

namespace epcomm {

/// The codes of one lane's 16 bytes of a row, and the scale of its group.
struct QuantVector {
  uint32_t codes[2];
  GroupScale scale;
};

template <Quant kQuant, Dtype kDtype>
struct QuantLanes {
  static constexpr bool kFp4 = kQuant == Quant::kNvfp4;
  static constexpr int kElements = kPerVector<kDtype>;                         ///< of a lane
  static constexpr int kLanes = (kFp4 ? kNvfp4Group : kFp8Group) / kElements;  ///< of a group
  static constexpr int kCodeBytes = kFp4 ? kElements / 2 : kElements;          ///< of a lane
};

/// Bytes of the scale of a group.
template <Quant kQuant>
constexpr int kScaleUnitBytes = kQuant == Quant::kFp8 ? 4 : 1;

/// Two e4m3 codes, the first in the low byte. The instruction gives the bits of e4m3_encode: the
/// elements of a group are finite, or all NaN of positive sign.
__device__ __forceinline__ uint32_t e4m3_pair(float first, float second) {
#if __CUDA_ARCH__ >= 890
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
#else
  return e4m3_encode(first) | e4m3_encode(second) << 8;
#endif
}

/// Turns two e4m3 codes, the first in the low byte, back. Exact.
__device__ __forceinline__ void e4m3_pair_to_float(uint32_t codes, float* out) {
#if __CUDA_ARCH__ >= 890
  const __half2_raw pair =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  float16_pair_to_float(uint32_t{pair.x} | uint32_t{pair.y} << 16, out);
#else
  // As fp16, whose exponents are 8 larger: 2^8 too small. e4m3's NaN is a number there.
  const uint32_t magnitudes = (codes & 0x7f) << 7 | (codes & 0x7f00) << 15;
  float16_pair_to_float(magnitudes | (codes & 0x80) << 8 | (codes & 0x8000) << 16, out);
  const bool nan[2] = {(codes & 0x7f) == kE4m3Nan, (codes >> 8 & 0x7f) == kE4m3Nan};
#pragma unroll
  for (int i = 0; i < 2; ++i) out[i] = nan[i] ? bits_float(kFloatNan) : mul_rn(out[i], 256.0f);
#endif
}

template <Quant kQuant>
__device__ __forceinline__ GroupScale group_scale(uint32_t amax, const GlobalScale& global) {
  if constexpr (kQuant == Quant::kNvfp4) return nvfp4_scale(amax, global);
  if constexpr (kQuant == Quant::kFp8Ue8m0) return fp8_ue8m0_scale(amax);
  return fp8_scale(amax);
}

/// The codes of kElements numbers, of a group with this amax and scale.
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ QuantVector encode_floats(const float* x, uint32_t amax,
                                                     const GroupScale& scale) {
  using Lanes = QuantLanes<kQuant, kDtype>;
  QuantVector out;
  out.scale = scale;
  out.codes[0] = out.codes[1] = 0;
  if (amax >= kFloatInfinity) {  // NaN in all elements, whatever their signs
    out.codes[0] = out.codes[1] = Lanes::kFp4 ? 0x77777777u : 0x7f7f7f7fu;
    return out;
  }
#pragma unroll
  for (int i = 0; i < Lanes::kElements; i += 2) {
    const float first = mul_rn(x[i], scale.inverse), second = mul_rn(x[i + 1], scale.inverse);
    if constexpr (Lanes::kFp4)
      out.codes[0] |= e2m1_pair(first, second) << (4 * i);
    else
      out.codes[i / 4] |= e4m3_pair(first, second) << (8 * (i % 4));
  }
  return out;
}

/// As quantize_vector, of kElements numbers that take the place of a vector of kDtype.
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ QuantVector quantize_floats(const float* x, const GlobalScale& global) {
  using Lanes = QuantLanes<kQuant, kDtype>;
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < Lanes::kElements; ++i) amax = max(amax, magnitude_bits(x[i]));
#pragma unroll
  for (int mask = Lanes::kLanes / 2; mask > 0; mask /= 2)
    amax = max(amax, __shfl_xor_sync(kFullWarp, amax, mask));
  return encode_floats<kQuant, kDtype>(x, amax, group_scale<kQuant>(amax, global));
}

/// Of several vectors at a time, v, v + 32, ...: the lanes of a group share the work of finding
/// their scales, most of which is a division. global: of kNvfp4; any for the others.
template <Quant kQuant, Dtype kDtype, int kCount>
__device__ __forceinline__ void quantize_vectors(const uint4 (&vectors)[kCount],
                                                 const GlobalScale& global,
                                                 QuantVector (&out)[kCount]) {
  using Lanes = QuantLanes<kQuant, kDtype>;
  uint32_t amax[kCount] = {};
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    float x[Lanes::kElements];
    vector_to_float<kDtype>(vectors[u], x);
#pragma unroll
    for (int i = 0; i < Lanes::kElements; ++i) amax[u] = max(amax[u], magnitude_bits(x[i]));
  }
#pragma unroll
  for (int mask = Lanes::kLanes / 2; mask > 0; mask /= 2)
#pragma unroll
    for (int u = 0; u < kCount; ++u)
      amax[u] = max(amax[u], __shfl_xor_sync(kFullWarp, amax[u], mask));

  // Lane l finds the scales of vectors l % kShare, l % kShare + kShare, ...
  constexpr int kShare = Lanes::kLanes < kCount ? Lanes::kLanes : kCount;
  static_assert(kCount % kShare == 0 && Lanes::kLanes % kShare == 0);
  const int mine = lane_index() % kShare, group = lane_index() - mine;
  GroupScale scale[kCount / kShare];
#pragma unroll
  for (int j = 0; j < kCount / kShare; ++j) {
    uint32_t largest = amax[j * kShare];
#pragma unroll
    for (int i = 1; i < kShare; ++i)
      if (mine == i) largest = amax[j * kShare + i];
    scale[j] = group_scale<kQuant>(largest, global);
  }
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    GroupScale theirs = scale[u / kShare];
    if constexpr (kShare > 1) {
      theirs.code = __shfl_sync(kFullWarp, theirs.code, group + u % kShare);
      theirs.inverse = __shfl_sync(kFullWarp, theirs.inverse, group + u % kShare);
    }
    float x[Lanes::kElements];
    vector_to_float<kDtype>(vectors[u], x);
    out[u] = encode_floats<kQuant, kDtype>(x, amax[u], theirs);
  }
}

template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ QuantVector quantize_vector(const uint4& vector,
                                                       const GlobalScale& global) {
  const uint4 vectors[1] = {vector};
  QuantVector out[1];
  quantize_vectors<kQuant, kDtype>(vectors, global, out);
  return out[0];
}

/// Stores the codes of vector v of a row that starts at q (16-byte aligned).
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ void store_codes(char* q, int v, const QuantVector& out) {
  constexpr int kBytes = QuantLanes<kQuant, kDtype>::kCodeBytes;
  char* to = q + int64_t{v} * kBytes;
  if constexpr (kBytes == 8)
    *reinterpret_cast<uint2*>(to) = make_uint2(out.codes[0], out.codes[1]);
  else if constexpr (kBytes == 4)
    *reinterpret_cast<uint32_t*>(to) = out.codes[0];
  else
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(out.codes[0]);
}

/// Whether the lane that holds vector v stores the scale of its group, which is group_of<...>(v).
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ bool stores_scale(int v) {
  return v % QuantLanes<kQuant, kDtype>::kLanes == 0;
}
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ int group_of(int v) {
  return v / QuantLanes<kQuant, kDtype>::kLanes;
}
template <Quant kQuant>
__device__ __forceinline__ void store_scale(char* to, const GroupScale& scale) {
  if constexpr (kQuant == Quant::kFp8)
    *reinterpret_cast<uint32_t*>(to) = scale.code;
  else
    *reinterpret_cast<uint8_t*>(to) = static_cast<uint8_t>(scale.code);
}

/// A warp writes what a row of scales as a dispatch moves it (16-byte aligned) holds beside the
/// scales: zeros, and the global scale of kNvfp4 in the last 4 of its wire_scale_bytes.
template <Quant kQuant>
__device__ __forceinline__ void finish_scales(char* scales, const QuantLayout& layout,
                                              float global) {
  if constexpr (kQuant == Quant::kFp8Ue8m0) {
    const int i = layout.num_groups + lane_index();
    if (i < layout.scale_bytes) scales[i] = 0;
  }
  if constexpr (kQuant == Quant::kNvfp4) {
    const int i = layout.scale_bytes + lane_index(), end = layout.wire_scale_bytes - 4;
    if (i < end) scales[i] = 0;
    if (lane_index() == 0) *reinterpret_cast<float*>(scales + end) = global;
  }
}

/// Turns the codes of vector v back: kElements floats.
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ void dequantize_vector(const char* q, int v, float scale, float* x) {
  using Lanes = QuantLanes<kQuant, kDtype>;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(q) + int64_t{v} * Lanes::kCodeBytes;
#pragma unroll
  for (int i = 0; i < Lanes::kElements; i += 2) {
    float pair[2];
    if constexpr (Lanes::kFp4) {
      pair[0] = e2m1_decode(codes[i / 2] & 15u);
      pair[1] = e2m1_decode(codes[i / 2] >> 4u);
    } else {
      e4m3_pair_to_float(codes[i] | uint32_t{codes[i + 1]} << 8, pair);
    }
    x[i] = mul_rn(pair[0], scale);
    x[i + 1] = mul_rn(pair[1], scale);
  }
}

}  // namespace epcomm
