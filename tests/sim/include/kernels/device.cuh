// The verbs of csrc/kernels/device.cuh on simulated devices: see docs/simulator.md. Found instead
// of it by the order of include paths.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <type_traits>

#include "epcomm/types.h"
#include "kernels/token_layout.h"
#include "tests/sim/bulk_copies.h"

#define EPCOMM_SELDOM __attribute__((noinline))
#define EPCOMM_SHARED(T, name)     \
  static const char name##_id = 0; \
  std::type_identity_t<T>& name = ::epcomm::sim::block_variable<std::type_identity_t<T>>(&name##_id)

namespace epcomm {
namespace sim {
template <class T>
T& block_variable(const void* id) {
  static_assert(std::is_trivially_default_constructible_v<T>);
  return *reinterpret_cast<T*>(grid().shared_variable(id, sizeof(T)));
}
}  // namespace sim

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }
inline uint32_t lanes_below(int lane) { return (1u << lane) - 1; }
inline char* dynamic_shared() { return sim::self().block->dynamic; }

inline uint64_t from_here_on(uint64_t value) { return value; }
inline uint4 load_streaming(const void* p) { return *static_cast<const uint4*>(p); }
inline void load_streaming_if(bool there, uint4& v, const void* p) {
  if (there) v = load_streaming(p);
}
inline void load_if(bool there, uint4& v, const uint4* p) {
  if (there) v = *p;
}
inline void store_streaming(void* p, const uint4& value) { sim::grid().store_late(p, &value); }

// ---- signals ----
inline void store_release_system(uint64_t* p, uint64_t value) {
  sim::grid().hold_back();
  sim::grid().flush_stores();
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
inline uint64_t load_acquire_system(const uint64_t* p,
                                    const sim::Where& where = sim::Where::current()) {
  sim::grid().poll("load_acquire_system", where);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline uint64_t load_relaxed_system(const uint64_t* p,
                                    const sim::Where& where = sim::Where::current()) {
  sim::grid().poll("load_relaxed_system", where);
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline uint32_t load_relaxed_system(const uint32_t* p,
                                    const sim::Where& where = sim::Where::current()) {
  sim::grid().poll("load_relaxed_system", where);
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline uint4 load_relaxed_system(const uint4* p, const sim::Where& where = sim::Where::current()) {
  sim::grid().poll("load_relaxed_system", where);
  return {__atomic_load_n(&p->x, __ATOMIC_RELAXED), __atomic_load_n(&p->y, __ATOMIC_RELAXED),
          __atomic_load_n(&p->z, __ATOMIC_RELAXED), __atomic_load_n(&p->w, __ATOMIC_RELAXED)};
}
inline ulonglong2 load_relaxed_system(const ulonglong2* p,
                                      const sim::Where& where = sim::Where::current()) {
  sim::grid().poll("load_relaxed_system", where);
  return {__atomic_load_n(&p->x, __ATOMIC_RELAXED), __atomic_load_n(&p->y, __ATOMIC_RELAXED)};
}
template <class Word>
inline void load_relaxed_system_if(bool there, Word& v, const Word* p,
                                   const sim::Where& where = sim::Where::current()) {
  if (there) v = load_relaxed_system(p, where);
}
inline void store_relaxed_system(uint64_t* p, uint64_t value) {
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
}
inline void fence_system() { __threadfence_system(); }
inline void store_release_block(int32_t* p, int32_t value) {
  sim::grid().hold_back();
  sim::grid().flush_stores();
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
inline int32_t load_acquire_block(const int32_t* p,
                                  const sim::Where& where = sim::Where::current()) {
  sim::grid().poll("load_acquire_block", where);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline uint64_t global_time_ns() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

// ---- bulk copies ----
constexpr bool kHasBulkCopies = true;
using BulkBarrier = uint64_t;

namespace sim {
// Where a kernel's barrier is, checked.
inline Barrier* barrier_at(BulkBarrier* barrier, bool initialised, const Where& where) {
  auto* b = reinterpret_cast<Barrier*>(barrier);
  if (!self().block->owns(barrier, sizeof *barrier))
    grid().fail("a bulk barrier outside of shared memory", where);
  if (initialised && !b->valid()) grid().fail("a bulk barrier that was not initialised", where);
  return b;
}
inline void check_copy(const void* shared, const void* global, uint32_t bytes, const Where& where) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes) % 16 != 0)
    grid().fail("a bulk copy of which an address or the size, " + std::to_string(bytes) +
                    ", is not a multiple of 16",
                where);
  if (!self().block->owns(shared, bytes))
    grid().fail("a bulk copy outside of the block's shared memory", where);
}
}  // namespace sim

inline void barrier_init(BulkBarrier* barrier, const sim::Where& where = sim::Where::current()) {
  sim::barrier_at(barrier, false, where)->init();
}
inline void fence_barrier_init() {}
inline void barrier_expect(BulkBarrier* barrier, uint32_t bytes,
                           const sim::Where& where = sim::Where::current()) {
  sim::Barrier* b = sim::barrier_at(barrier, true, where);
  if (b->arrived != 0) sim::grid().fail("a second barrier_expect in one phase", where);
  b->arrived = 1;
  b->bytes += static_cast<int32_t>(bytes);
  b->settle();
}
inline void barrier_wait(BulkBarrier* barrier, uint32_t parity,
                         const sim::Where& where = sim::Where::current()) {
  sim::Barrier* b = sim::barrier_at(barrier, true, where);
  sim::grid().hold_back();
  while (b->phase == (parity & 1)) sim::grid().poll("barrier_wait", where);
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, BulkBarrier* barrier,
                      const sim::Where& where = sim::Where::current()) {
  sim::check_copy(shared, global, bytes, where);
  sim::grid().copies.load(sim::self(), shared, global, bytes,
                          sim::barrier_at(barrier, true, where));
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes,
                       const sim::Where& where = sim::Where::current()) {
  sim::check_copy(shared, global, bytes, where);
  sim::grid().copies.store(sim::self(), global, shared, bytes);
}
inline void bulk_commit() { sim::grid().copies.commit(sim::self()); }
template <int kPending>
inline void bulk_wait_read() {
  sim::grid().hold_back();
  sim::grid().copies.finish_reads(sim::self(), kPending);
}
template <int kPending = 0>
inline void bulk_wait_written() {
  sim::grid().hold_back();
  sim::grid().copies.finish_writes(sim::self(), kPending);
}
inline void fence_shared_for_bulk() {}
inline void fence_global_for_bulk() {}

// ---- conversions, to nearest, ties to even ----
inline uint32_t bfloat16_pair(float low, float high) {
  auto round = [](float f) {
    const uint32_t u = __float_as_uint(f);
    return f != f ? 0x7fffu : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
inline uint32_t float16_pair(float low, float high) {
  const _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  return std::bit_cast<uint32_t>(pair);
}
inline void float16_pair_to_float(uint32_t word, float* out) {
  _Float16 pair[2];
  std::memcpy(pair, &word, sizeof word);
  out[0] = static_cast<float>(pair[0]);
  out[1] = static_cast<float>(pair[1]);
}

}  // namespace epcomm
