// CUDA C++ as plain C++, for simulated devices: see docs/simulator.md.
#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "tests/sim/grid.h"
#include "tests/sim/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

namespace epcomm::sim {
// A built-in variable: what it is for the thread that reads it. One dimension.
template <unsigned (*kValue)()>
struct BuiltIn {
  struct X {
    operator unsigned() const { return kValue(); }
  } x;
};
inline unsigned thread_idx() { return self().index; }
inline unsigned block_idx() { return self().block->index; }
inline unsigned block_dim() { return grid().shape.threads; }
inline unsigned grid_dim() { return grid().shape.blocks; }

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    return static_cast<uint64_t>(int64_t{value});
  } else {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
  }
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);  // little-endian
  return value;
}
}  // namespace epcomm::sim
static_assert(std::endian::native == std::endian::little);

inline constexpr epcomm::sim::BuiltIn<epcomm::sim::thread_idx> threadIdx;
inline constexpr epcomm::sim::BuiltIn<epcomm::sim::block_idx> blockIdx;
inline constexpr epcomm::sim::BuiltIn<epcomm::sim::block_dim> blockDim;
inline constexpr epcomm::sim::BuiltIn<epcomm::sim::grid_dim> gridDim;

// ---- vectors ----
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- arithmetic ----
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __popcll(unsigned long long v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
// Compiled without contraction: each operation rounds.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

// ---- barriers and warp collectives ----
inline void __syncthreads(epcomm::sim::Where where = epcomm::sim::Where::current()) {
  epcomm::sim::grid().sync_block(false, where);
}
inline int __syncthreads_or(int vote, epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::grid().sync_block(vote != 0, where).count != 0;
}
inline int __syncthreads_and(int vote, epcomm::sim::Where where = epcomm::sim::Where::current()) {
  const epcomm::sim::Votes votes = epcomm::sim::grid().sync_block(vote != 0, where);
  return votes.count == votes.of;
}
inline int __syncthreads_count(int vote, epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::grid().sync_block(vote != 0, where).count;
}

namespace epcomm::sim {
template <class T>
T meet(Collective collective, unsigned mask, T value, int source_lane, const char* verb,
       const Where& where) {
  return from_bits<T>(grid().meet_warp(collective, mask, to_bits(value), source_lane, verb, where));
}
inline unsigned ballot(unsigned mask, bool vote, const char* verb, const Where& where) {
  return static_cast<unsigned>(
      grid().meet_warp(Collective::kBallot, mask, vote ? 1 : 0, 0, verb, where));
}
}  // namespace epcomm::sim

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       epcomm::sim::Where where = epcomm::sim::Where::current()) {
  epcomm::sim::grid().meet_warp(epcomm::sim::Collective::kSync, mask, 0, 0, "__syncwarp", where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane,
              epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::meet(epcomm::sim::Collective::kShuffle, mask, value, lane & 31, "__shfl_sync",
                           where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta,
                 epcomm::sim::Where where = epcomm::sim::Where::current()) {
  const int own = epcomm::sim::self().lane, lane = own - static_cast<int>(delta);
  return epcomm::sim::meet(epcomm::sim::Collective::kShuffle, mask, value, lane < 0 ? own : lane,
                           "__shfl_up_sync", where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   epcomm::sim::Where where = epcomm::sim::Where::current()) {
  const int own = epcomm::sim::self().lane, lane = own + static_cast<int>(delta);
  return epcomm::sim::meet(epcomm::sim::Collective::kShuffle, mask, value, lane > 31 ? own : lane,
                           "__shfl_down_sync", where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits,
                  epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::meet(epcomm::sim::Collective::kShuffle, mask, value,
                           (epcomm::sim::self().lane ^ bits) & 31, "__shfl_xor_sync", where);
}
inline unsigned __ballot_sync(unsigned mask, int vote,
                              epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::ballot(mask, vote != 0, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, int vote,
                      epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::ballot(mask, vote != 0, "__any_sync", where) != 0;
}
inline int __all_sync(unsigned mask, int vote,
                      epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::ballot(mask, vote == 0, "__all_sync", where) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value,
                          epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return static_cast<unsigned>(epcomm::sim::grid().meet_warp(epcomm::sim::Collective::kMatchAny,
                                                             mask, epcomm::sim::to_bits(value), 0,
                                                             "__match_any_sync", where));
}
template <class T>
T __reduce_add_sync(unsigned mask, T value,
                    epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::meet(epcomm::sim::Collective::kReduceAdd, mask, value, 0, "__reduce_add_sync",
                           where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value,
                    epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::meet(epcomm::sim::Collective::kReduceMin, mask, value, 0, "__reduce_min_sync",
                           where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value,
                    epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::meet(epcomm::sim::Collective::kReduceMax, mask, value, 0, "__reduce_max_sync",
                           where);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::meet(epcomm::sim::Collective::kReduceOr, mask, value, 0, "__reduce_or_sync",
                           where);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                  epcomm::sim::Where where = epcomm::sim::Where::current()) {
  return epcomm::sim::meet(epcomm::sim::Collective::kReduceAnd, mask, value, 0, "__reduce_and_sync",
                           where);
}

// ---- memory ----
inline void __threadfence_block() { epcomm::sim::grid().flush_stores(); }
inline void __threadfence() {
  epcomm::sim::grid().flush_stores();
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_system() { __threadfence(); }
inline void __nanosleep(unsigned, epcomm::sim::Where where = epcomm::sim::Where::current()) {
  epcomm::sim::grid().poll("__nanosleep", where);
}

// Relaxed, as CUDA's: they order nothing else.
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  epcomm::sim::grid().hold_back();
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicSub(T* p, std::type_identity_t<T> value) {
  epcomm::sim::grid().hold_back();
  return __atomic_fetch_sub(p, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  epcomm::sim::grid().hold_back();
  return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> value) {
  epcomm::sim::grid().hold_back();
  return __atomic_fetch_and(p, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  epcomm::sim::grid().hold_back();
  return __atomic_exchange_n(p, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  epcomm::sim::grid().hold_back();
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value < old && atomicCAS(p, old, value) != old) old = __atomic_load_n(p, __ATOMIC_RELAXED);
  return old;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < value && atomicCAS(p, old, value) != old) old = __atomic_load_n(p, __ATOMIC_RELAXED);
  return old;
}

// ---- launches ----
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  epcomm::sim::shared_bytes_allowed(reinterpret_cast<const void*>(kernel)) =
      static_cast<size_t>(value);
  return cudaSuccess;
}
template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... args) {
  return epcomm::sim::enqueue_grid(
      *config,
      [kernel, values = std::tuple<std::decay_t<Expected>...>(args...)] {
        std::apply(kernel, values);
      },
      (sizeof(Expected) + ... + 0),
      epcomm::sim::shared_bytes_allowed(reinterpret_cast<const void*>(kernel)));
}
