// What the row kernels (pack, place, reduce) share: how rows become jobs of warps, 16-byte copies,
// and which rows come from or go to which rank.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "epcomm/types.h"
#include "kernels/device.cuh"
#include "kernels/kernels.h"
#include "kernels/token_layout.h"

namespace epcomm {

constexpr int kRowThreads = 768;  ///< a block fills an SM: up to 80 registers a thread
constexpr int kVectorBytes = 16;
constexpr int kUnroll = 4;  ///< vectors that a lane has in flight
constexpr size_t kMaxKernelArgs = 4096;

/// Part of one row, for one warp: vectors [begin, end).
struct RowJob {
  int row;
  int begin, end;
  bool leads;  ///< the part that also takes the row's metadata
};

/// Cuts rows into jobs, enough of them to keep every warp of the grid busy, and deals them out so
/// that few jobs spread over all SMs.
struct RowJobs {
  int first, step, count;
  int parts, units, vectors;

  /// By all warps of the grid.
  __device__ RowJobs(int rows, int row_bytes)
      : RowJobs(rows, row_bytes,
                warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x),
                static_cast<int>(gridDim.x * blockDim.x) / kWarpSize) {}
  /// By warp number w of `warps`.
  __device__ RowJobs(int rows, int row_bytes, int w, int warps) : first(w), step(warps) {
    vectors = row_bytes / kVectorBytes;
    units = (vectors + kWarpSize - 1) / kWarpSize;
    const int wanted = rows > 0 ? (2 * step + rows - 1) / rows : 1;
    parts = max(min(wanted, units / kUnroll), 1);
    count = rows * parts;
  }
  __device__ RowJob at(int job) const {
    const int row = job / parts, part = job - row * parts;
    return {row, units * part / parts * kWarpSize,
            min(units * (part + 1) / parts * kWarpSize, vectors), part == 0};
  }
};

/// What is known of rows in memory.
enum class RowMemory {
  kConstant,  ///< nobody writes them while the kernel runs
  kArrived,   ///< a peer wrote them while the kernel ran; the lane has acquired its signal
  kArriving,  ///< a peer may write them still
};

/// The vectors v, v + 32, ... of a row that a lane holds at a time.
template <int kVectors>
struct BatchOf {
  static constexpr int kStep = kVectors * kWarpSize;
  uint4 data[kVectors];

  template <RowMemory kMemory = RowMemory::kConstant>
  __device__ __forceinline__ void load(const char* row, int v, int end) {
    const char* at = row + int64_t{v} * kVectorBytes;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const char* p = at + u * kWarpSize * kVectorBytes;
      const bool there = v + u * kWarpSize < end;
      if constexpr (kMemory == RowMemory::kConstant)
        load_streaming_if(there, data[u], p);
      else if constexpr (kMemory == RowMemory::kArriving)
        load_relaxed_system_if(there, data[u], reinterpret_cast<const uint4*>(p));
      else
        load_if(there, data[u], reinterpret_cast<const uint4*>(p));
    }
  }
  __device__ __forceinline__ void store(char* row, int v, int end) const {
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (v + u * kWarpSize < end)
        store_streaming(row + int64_t{v + u * kWarpSize} * kVectorBytes, data[u]);
  }
  /// Stores one value to all of them.
  static __device__ __forceinline__ void fill(char* row, int v, int end, const uint4& value) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (v + u * kWarpSize < end)
        store_streaming(row + int64_t{v + u * kWarpSize} * kVectorBytes, value);
  }
  /// Whether is(vector) holds of all of them.
  template <class Is>
  __device__ __forceinline__ bool all(int v, int end, Is is) const {
    bool every = true;
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (v + u * kWarpSize < end) every &= is(data[u]);
    return every;
  }
};
using Batch = BatchOf<kUnroll>;

template <class Word>
__device__ __forceinline__ void copy_words(char* to, const char* from, int bytes) {
  const int words = bytes / static_cast<int>(sizeof(Word));
  for (int i = lane_index(); i < words; i += kWarpSize) {
    const Word word = reinterpret_cast<const Word*>(from)[i];
    if constexpr (sizeof(Word) == sizeof(uint4))
      store_streaming(to + i * static_cast<int>(sizeof(Word)), word);
    else
      reinterpret_cast<Word*>(to)[i] = word;
  }
}

/// A warp copies bytes of any number and alignment, in words as wide as they allow.
__device__ __forceinline__ void copy_bytes(char* to, const char* from, int bytes) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) |
                         static_cast<uintptr_t>(bytes);
  if (bits % sizeof(uint4) == 0)
    copy_words<uint4>(to, from, bytes);
  else if (bits % sizeof(uint32_t) == 0)
    copy_words<uint32_t>(to, from, bytes);
  else
    copy_words<uint8_t>(to, from, bytes);
}

/// Element i of an array of ids of either size.
__device__ __forceinline__ void store_index(void* array, IndexType type, int64_t i, int32_t value) {
  if (type == IndexType::kInt32)
    static_cast<int32_t*>(array)[i] = value;
  else
    static_cast<int64_t*>(array)[i] = value;
}

/// One token's routing at one rank: lane k < K holds slot k; token is the same in all lanes.
struct TokenSlots {
  int32_t row = -1;
  int32_t expert = -1;
  float weight = 0.0f;
  int32_t token = -1;
};

/// A warp writes a record of MetaLayout.
__device__ __forceinline__ void write_record(const MetaLayout& meta, void* record,
                                             const TokenSlots& slots, bool weighted) {
  const int lane = lane_index();
  if (lane < meta.topk) {
    meta.row(record, 0)[lane] = slots.row;
    meta.topk_idx(record, 0)[lane] = slots.expert;
    if (weighted) meta.topk_weights(record, 0)[lane] = slots.weight;
  }
  if (lane == 0) *meta.token(record, 0) = slots.token;
}

/// The lanes whose row no lower lane has.
__device__ __forceinline__ uint32_t distinct_rows(int32_t row) {
  const uint32_t same = __match_any_sync(kFullWarp, row);
  return __ballot_sync(kFullWarp, row >= 0 && (same & lanes_below(lane_index())) == 0);
}

/// Fills before[r] (shared memory): tokens that ranks lower than this one send to rank r. A slot at
/// rank r less that is the token's index among this rank's. Ends with a barrier.
__device__ __forceinline__ void count_sent_before(int32_t* before, const int32_t* rank_count,
                                                  int num_ranks, int rank) {
  if (const int r = thread_index(); r < num_ranks) {
    int32_t sum = 0;
    for (int s = 0; s < rank; ++s) sum += rank_count[s * num_ranks + r];
    before[r] = sum;
  }
  __syncthreads();
}

/// Where one token of this rank goes: lane r holds its index among this rank's tokens at rank r,
/// and at rank r + 32; -1 = not sent there.
struct TokenRanks {
  int32_t low, high;

  /// slot: of the token, [R]; before: of count_sent_before.
  __device__ __forceinline__ TokenRanks(const int32_t* slot, const int32_t* before, int num_ranks) {
    low = index_at(slot, before, lane_index(), num_ranks);
    high = index_at(slot, before, lane_index() + kWarpSize, num_ranks);
  }
  static __device__ __forceinline__ int32_t index_at(const int32_t* slot, const int32_t* before,
                                                     int r, int num_ranks) {
    if (r >= num_ranks) return -1;
    const int32_t n = slot[r];
    return n < 0 ? -1 : n - before[r];
  }
  /// Bit r: sent to rank r.
  __device__ __forceinline__ uint64_t ranks() const {
    return __ballot_sync(kFullWarp, low >= 0) |
           static_cast<uint64_t>(__ballot_sync(kFullWarp, high >= 0)) << kWarpSize;
  }
  /// For r the same in all lanes.
  __device__ __forceinline__ int32_t index(int r) const {
    return __shfl_sync(kFullWarp, r < kWarpSize ? low : high, r % kWarpSize);
  }
};

/// The lowest bit of a set that is not empty, which is taken out.
__device__ __forceinline__ int take_lowest(uint64_t& set) {
  const int bit = __ffsll(static_cast<long long>(set)) - 1;
  set &= set - 1;
  return bit;
}
__device__ __forceinline__ int take_lowest(uint32_t& set) {
  const int bit = __ffs(static_cast<int>(set)) - 1;
  set &= set - 1;
  return bit;
}

/// The sum over the lanes up to this one.
__device__ __forceinline__ int32_t up_to_lane(int32_t value) {
#pragma unroll
  for (int d = 1; d < kWarpSize; d *= 2) {
    const int32_t below = __shfl_up_sync(kFullWarp, value, d);
    if (lane_index() >= d) value += below;
  }
  return value;
}

/// Tokens of one source rank: of total received, the first skipped are passed over and the next
/// taken are worked on.
struct SourceCount {
  int32_t skipped, taken, total;
};

/// What of the tokens that source s has sent to this rank is in the chunk that args of a kernel
/// name.
template <class Args>
__device__ __forceinline__ SourceCount chunk_of_source(const Args& args, int s) {
  const int num_ranks = args.dims.num_ranks;
  const int32_t total = args.plan.rank_count[s * num_ranks + args.rank];
  if (args.chunks == 1) return {0, total, total};
  const AnnounceLayout layout{num_ranks, args.dims.num_experts};
  const int32_t* announced = args.plan.announced + int64_t{s} * layout.words();
  int32_t skipped = 0;
  for (int c = 0; c < args.chunk; ++c) skipped += announced[layout.chunk_count(c) + args.rank];
  return {skipped, announced[layout.chunk_count(args.chunk) + args.rank], total};
}

/// Lines the taken tokens of all sources up, by source (shared memory).
struct SourceRanges {
  int32_t end[kMaxPackRanks];        ///< first position after the tokens of source s
  int32_t to_source[kMaxPackRanks];  ///< position + to_source[s] = index among the tokens of s
  int32_t to_recv[kMaxPackRanks];    ///< position + to_recv[s] = received token

  /// counts(s) gives the SourceCount of s. By the whole block; ends with a barrier.
  template <class Counts>
  __device__ void fill(int num_ranks, Counts counts) {
    const int lane = lane_index();
    int32_t taken_before = 0, total_before = 0;
    for (int first = 0; warp_index() == 0 && first < num_ranks; first += kWarpSize) {
      const int s = first + lane;
      const SourceCount own = s < num_ranks ? counts(s) : SourceCount{};
      const int32_t taken = taken_before + up_to_lane(own.taken);
      const int32_t total = total_before + up_to_lane(own.total);
      if (s < num_ranks) {
        end[s] = taken;
        to_source[s] = own.skipped - (taken - own.taken);
        to_recv[s] = total - own.total + own.skipped - (taken - own.taken);
      }
      taken_before = __shfl_sync(kFullWarp, taken, kWarpSize - 1);
      total_before = __shfl_sync(kFullWarp, total, kWarpSize - 1);
    }
    __syncthreads();
  }
  __device__ __forceinline__ int begin(int s) const { return s == 0 ? 0 : end[s - 1]; }
  /// Most tokens taken of one source.
  __device__ __forceinline__ int longest(int num_ranks) const {
    int most = 0;
    for (int s = 0; s < num_ranks; ++s) most = max(most, end[s] - begin(s));
    return most;
  }
  /// The source of the token at a position, for a warp.
  __device__ __forceinline__ int source(int position, int num_ranks) const {
    const int lane = lane_index();
    int before = __popc(__ballot_sync(kFullWarp, lane < num_ranks && end[lane] <= position));
    if (num_ranks > kWarpSize)
      before += __popc(__ballot_sync(
          kFullWarp, lane + kWarpSize < num_ranks && end[lane + kWarpSize] <= position));
    return before;
  }
};

}  // namespace epcomm
