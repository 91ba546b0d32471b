// Rows as numbers: the element types that a combine sums, and 16-byte vectors of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "epcomm/types.h"
#include "kernels/device.cuh"

namespace epcomm {

/// An element type of rows that are summed, by the 4-byte word.
template <Dtype kDtype>
struct Element;

template <>
struct Element<Dtype::kBfloat16> {
  static constexpr int kPerWord = 2;
  static __device__ __forceinline__ void to_float(uint32_t word, float* out) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t from_float(const float* in) {
    return bfloat16_pair(in[0], in[1]);
  }
};

template <>
struct Element<Dtype::kFloat16> {
  static constexpr int kPerWord = 2;
  static __device__ __forceinline__ void to_float(uint32_t word, float* out) {
    float16_pair_to_float(word, out);
  }
  static __device__ __forceinline__ uint32_t from_float(const float* in) {
    return float16_pair(in[0], in[1]);
  }
};

template <>
struct Element<Dtype::kFloat32> {
  static constexpr int kPerWord = 1;
  static __device__ __forceinline__ void to_float(uint32_t word, float* out) {
    out[0] = __uint_as_float(word);
  }
  static __device__ __forceinline__ uint32_t from_float(const float* in) {
    return __float_as_uint(in[0]);
  }
};

template <Dtype kDtype>
constexpr int kElementBytes = dtype_bytes(kDtype);
/// Elements of a 16-byte vector.
template <Dtype kDtype>
constexpr int kPerVector = 4 * Element<kDtype>::kPerWord;

template <Dtype kDtype>
__device__ __forceinline__ void vector_to_float(const uint4& v, float* out) {
  constexpr int n = Element<kDtype>::kPerWord;
  Element<kDtype>::to_float(v.x, out);
  Element<kDtype>::to_float(v.y, out + n);
  Element<kDtype>::to_float(v.z, out + 2 * n);
  Element<kDtype>::to_float(v.w, out + 3 * n);
}

template <Dtype kDtype>
__device__ __forceinline__ uint4 vector_from_float(const float* in) {
  constexpr int n = Element<kDtype>::kPerWord;
  return make_uint4(Element<kDtype>::from_float(in), Element<kDtype>::from_float(in + n),
                    Element<kDtype>::from_float(in + 2 * n),
                    Element<kDtype>::from_float(in + 3 * n));
}

}  // namespace epcomm
