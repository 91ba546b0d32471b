// What device code does beyond C++, named by meaning. The only file with PTX. Needs sm_80 or later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "epcomm/types.h"

namespace epcomm {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;  ///< all lanes take part

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ __forceinline__ uint32_t lanes_below(int lane) { return (1u << lane) - 1; }

/// The dynamic shared memory of the block.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ uint4 epcomm_dynamic_shared[];
  return reinterpret_cast<char*>(epcomm_dynamic_shared);
}

/// Loads 16 bytes of global memory that nobody writes while the kernel runs and that are read once.
__device__ __forceinline__ uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Element types of rows that are summed. Conversions to 16 bits round to nearest, ties to even.

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
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(in[1]), "f"(in[0]));
    return word;
  }
};

template <>
struct Element<Dtype::kFloat16> {
  static constexpr int kPerWord = 2;
  static __device__ __forceinline__ void to_float(uint32_t word, float* out) {
    asm("{\n"
        "  .reg .b16 low, high;\n"
        "  mov.b32 {low, high}, %2;\n"
        "  cvt.f32.f16 %0, low;\n"
        "  cvt.f32.f16 %1, high;\n"
        "}"
        : "=f"(out[0]), "=f"(out[1])
        : "r"(word));
  }
  static __device__ __forceinline__ uint32_t from_float(const float* in) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(in[1]), "f"(in[0]));
    return word;
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
