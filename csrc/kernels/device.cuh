// What device code does beyond C++, named by meaning. The only file with PTX. Needs sm_80 or later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "epcomm/types.h"
#include "kernels/token_layout.h"

namespace epcomm {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;  ///< all lanes take part

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ __forceinline__ uint32_t lanes_below(int lane) { return (1u << lane) - 1; }

/// Of a function that is seldom called: its code is not between what runs before and after it. A
/// warp that goes on behind code that it has skipped waits for instructions, 0.1 to 0.2 us each
/// time.
#define EPCOMM_SELDOM __noinline__

/// A variable `name` of type T (int[4] is one, too) in the shared memory of the block, with any
/// content at first. Of every block its own, also where one thread runs many of them.
#define EPCOMM_SHARED(T, name) __shared__ std::type_identity_t<T> name

/// The dynamic shared memory of the block. Begins at a multiple of kBulkLine, whatever precedes it.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(kBulkLine) uint4 epcomm_dynamic_shared[];
  return reinterpret_cast<char*>(epcomm_dynamic_shared);
}

/// The same value, of which nothing is worked out before the loads above have been issued: a thread
/// that needs what is still on its way would issue them late.
__device__ __forceinline__ uint64_t from_here_on(uint64_t value) {
  asm volatile("" : "+l"(value)::"memory");
  return value;
}

/// Loads 16 bytes of global memory that nobody writes while the kernel runs and that are read once.
__device__ __forceinline__ uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

/// The same if there is something to load; else v stays as it is. Of several such loads none waits
/// for another, as they do behind branches: there each is merged with what v is otherwise.
__device__ __forceinline__ void load_streaming_if(bool there, uint4& v, const void* p) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.s32 there, %5, 0;\n"
      "@there ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(static_cast<int>(there)));
}

/// The same of memory that others may have written while the kernel runs.
__device__ __forceinline__ void load_if(bool there, uint4& v, const uint4* p) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.s32 there, %5, 0;\n"
      "@there ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(static_cast<int>(there))
      : "memory");
}

/// Stores 16 bytes that no thread of this kernel loads before a barrier, unless it polls for them:
/// others may see them late.
__device__ __forceinline__ void store_streaming(void* p, const uint4& value) {
  *static_cast<uint4*>(p) = value;
}

// Signals between GPUs: words in the memory of the rank that waits for them. A release covers all
// that happened before it, in this thread or in threads that it was ordered after by a barrier or
// an acquire; it is paired with the acquire of whoever sees the value.

__device__ __forceinline__ void store_release_system(uint64_t* p, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
/// Orders nothing; for words that are polled beside the signal waited for.
__device__ __forceinline__ uint64_t load_relaxed_system(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed_system(uint64_t* p, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
/// Of memory that a peer may write meanwhile: each word of 4 bytes is as it was or as it will be.
__device__ __forceinline__ uint32_t load_relaxed_system(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
// If there is something to load, else v stays as it is (load_streaming_if).
__device__ __forceinline__ void load_relaxed_system_if(bool there, uint32_t& v, const uint32_t* p) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.s32 there, %2, 0;\n"
      "@there ld.relaxed.sys.global.u32 %0, [%1];\n}"
      : "+r"(v)
      : "l"(p), "r"(static_cast<int>(there))
      : "memory");
}
__device__ __forceinline__ void load_relaxed_system_if(bool there, uint64_t& v, const uint64_t* p) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.s32 there, %2, 0;\n"
      "@there ld.relaxed.sys.global.u64 %0, [%1];\n}"
      : "+l"(v)
      : "l"(p), "r"(static_cast<int>(there))
      : "memory");
}
__device__ __forceinline__ void load_relaxed_system_if(bool there, uint4& v, const uint4* p) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.s32 there, %5, 0;\n"
      "@there ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(static_cast<int>(there))
      : "memory");
}
/// Two words of 8 bytes, each as it was or as it will be.
__device__ __forceinline__ void load_relaxed_system_if(bool there, ulonglong2& v,
                                                       const ulonglong2* p) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.s32 there, %3, 0;\n"
      "@there ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];\n}"
      : "+l"(v.x), "+l"(v.y)
      : "l"(p), "r"(static_cast<int>(there))
      : "memory");
}
__device__ __forceinline__ void fence_system() { __threadfence_system(); }

// The same between threads of a block, for words in its shared memory.
__device__ __forceinline__ void store_release_block(int32_t* p, int32_t value) {
  asm volatile("st.release.cta.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ int32_t load_acquire_block(const int32_t* p) {
  int32_t value;
  asm volatile("ld.acquire.cta.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
/// Nanoseconds; advances in steps of up to a microsecond.
__device__ __forceinline__ uint64_t global_time_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// Bulk copies (TMA), from sm_90 on: one thread moves up to a whole row between global memory, its
// own or a peer's, and shared memory. Addresses and sizes are multiples of 16 bytes. Loads tell a
// barrier in shared memory when they are complete; stores are counted in groups of the thread that
// issued them. Code that uses them is compiled under `if constexpr (kHasBulkCopies)`.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasBulkCopies = true;
#else
constexpr bool kHasBulkCopies = false;
#endif

/// A barrier in shared memory of which each phase ends when as many bytes as expected were loaded.
using BulkBarrier = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void barrier_init(BulkBarrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
/// After the inits of a thread, before a bulk load uses a barrier.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/// Starts a phase that ends when bytes were loaded.
__device__ __forceinline__ void barrier_expect(BulkBarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// Until the phase of this parity (0 for the first) is over. What was loaded is visible then.
__device__ __forceinline__ void barrier_wait(BulkBarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      "  .reg .pred done;\n"
      "again:\n"
      "  mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "  @!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          BulkBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
/// Closes the group of the stores since the last commit; an empty group counts, too.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Until at most kPending of this thread's newest groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
/// Until the stores of this thread are written, but for at most kPending of its newest groups: a
/// release by this thread covers them.
template <int kPending = 0>
__device__ __forceinline__ void bulk_wait_written() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
/// Between plain stores to shared memory and a bulk store that reads them (by any thread that a
/// barrier orders after this fence).
__device__ __forceinline__ void fence_shared_for_bulk() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// Between an acquire and a bulk load of what it made visible; between written bulk stores and a
/// release.
__device__ __forceinline__ void fence_global_for_bulk() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Conversions of two elements at a time, the first in the lower half; to nearest, ties to even.

__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t float16_pair(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ void float16_pair_to_float(uint32_t word, float* out) {
  asm("{\n"
      "  .reg .b16 low, high;\n"
      "  mov.b32 {low, high}, %2;\n"
      "  cvt.f32.f16 %0, low;\n"
      "  cvt.f32.f16 %1, high;\n"
      "}"
      : "=f"(out[0]), "=f"(out[1])
      : "r"(word));
}

}  // namespace epcomm
