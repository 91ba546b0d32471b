// Where tokens go, as bit masks in shared memory: what the kernels that route share.
//
// A tile is up to 256 tokens of one rank. For every destination rank and every expert (a column) it
// has a mask of its tokens. Setting a bit twice changes nothing, so duplicates count once, and the
// number of lower bits is a token's place, so results do not depend on the order of threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "epcomm/types.h"
#include "kernels/device.cuh"
#include "kernels/kernels.h"
#include "kernels/rows.cuh"
#include "kernels/token_layout.h"

namespace epcomm {

static_assert(kTileTokens % kWarpSize == 0);
constexpr int kTileWords = kTileTokens / kWarpSize;  ///< words of a full tile's mask

/// One tile in the shared memory of a block. Columns: R ranks, then E experts. Arrays per word are
/// word-major, so that the columns that lanes touch lie in different banks.
struct RouteTile {
  int num_ranks, columns, words;
  size_t base_at, prefix_at, bytes;
  char* memory = nullptr;

  /// words: of a mask, at most kTileWords.
  __host__ __device__ RouteTile(const Dims& dims, int words_)
      : num_ranks(dims.num_ranks), columns(dims.num_ranks + dims.num_experts), words(words_) {
    const size_t n = static_cast<size_t>(columns);
    base_at = n * static_cast<size_t>(words) * sizeof(uint32_t);
    prefix_at = base_at + n * sizeof(int32_t);
    bytes = align_up(prefix_at + n * static_cast<size_t>(words), sizeof(int32_t));
  }
  /// Tile i of several that lie one behind the other.
  __device__ RouteTile at(char* first, int i) const {
    RouteTile tile = *this;
    tile.memory = first + static_cast<size_t>(i) * bytes;
    return tile;
  }
  /// Tokens 32 * word, ... of the tile that go to a column.
  __device__ uint32_t& mask(int word, int column) const {
    return reinterpret_cast<uint32_t*>(memory)[word * columns + column];
  }
  __device__ bool has(int column, int t) const {
    return (mask(t / kWarpSize, column) >> (t % kWarpSize) & 1) != 0;
  }
  /// Place of the tile's first token in a column.
  __device__ int32_t& base(int column) const {
    return reinterpret_cast<int32_t*>(memory + base_at)[column];
  }
  /// Tokens of the words before, at most 224.
  __device__ uint8_t& prefix(int word, int column) const {
    return reinterpret_cast<uint8_t*>(memory + prefix_at)[word * columns + column];
  }
  /// Fills the prefixes of a column whose masks are complete. Returns the tokens in it.
  __device__ int fill_prefixes(int column) const {
    // All words are loaded before a prefix is stored, else each waits for the one before.
    uint32_t masks[kTileWords];
#pragma unroll
    for (int word = 0; word < kTileWords; ++word) masks[word] = mask(min(word, words - 1), column);
    int before = 0;
#pragma unroll
    for (int word = 0; word < kTileWords; ++word) {
      if (word < words) prefix(word, column) = static_cast<uint8_t>(before);
      before += word < words ? __popc(masks[word]) : 0;
    }
    return before;
  }
  /// Place in a column of the tile's token t, whose bit is set.
  __device__ int32_t place(int column, int t) const {
    const int word = t / kWarpSize;
    return base(column) + prefix(word, column) +
           __popc(mask(word, column) & lanes_below(t % kWarpSize));
  }
};

/// What a block knows of the experts beside its tiles, in shared memory.
struct RouteExperts {
  int num_experts;
  char* memory = nullptr;

  __host__ __device__ explicit RouteExperts(const Dims& dims) : num_experts(dims.num_experts) {}
  __host__ __device__ size_t bytes() const {
    return align_up(static_cast<size_t>(num_experts) * (2 * sizeof(int32_t) + 1), sizeof(int32_t));
  }
  /// Tokens for an expert, of all ranks.
  __device__ int32_t& total(int expert) const { return reinterpret_cast<int32_t*>(memory)[expert]; }
  /// First row of the expert's group in the layout of its owner.
  __device__ int32_t& start(int expert) const {
    return reinterpret_cast<int32_t*>(memory)[num_experts + expert];
  }
  __device__ uint8_t& owner(int expert) const {
    return reinterpret_cast<uint8_t*>(
        memory)[2 * sizeof(int32_t) * static_cast<size_t>(num_experts) +
                static_cast<size_t>(expert)];
  }
  /// By the whole block, before a barrier.
  __device__ void load_owners(const DeviceExperts& experts) const {
    for (int e = thread_index(); e < num_experts; e += static_cast<int>(blockDim.x))
      owner(e) = static_cast<uint8_t>(experts.rank[e]);
  }
};

/// Sets the bits of one word's tokens, by a warp: lane i has token 32 * word + i. id(k) gives the
/// lane's expert in slot k, of k = first, first + step, ... below topk (-1 = none); kIdsInFlight of
/// them are asked for at a time.
template <int kIdsInFlight = 4, class Id>
__device__ __forceinline__ void mark_word(const RouteTile& tile, const RouteExperts& experts,
                                          int word, int first, int step, int topk, Id id) {
  const uint32_t bit = 1u << lane_index();
  uint64_t ranks = 0;
  for (; first < topk; first += kIdsInFlight * step) {
    int32_t expert[kIdsInFlight];
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i)
      expert[i] = first + i * step < topk ? id(first + i * step) : -1;
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      if (expert[i] < 0) continue;
      atomicOr(&tile.mask(word, tile.num_ranks + expert[i]), bit);
      ranks |= uint64_t{1} << experts.owner(expert[i]);
    }
  }
  // Warps that share the slots of this word's tokens have ranks of their own.
  for (int r = 0; r < tile.num_ranks; ++r) {
    const uint32_t there = __ballot_sync(kFullWarp, (ranks >> r & 1) != 0);
    if (there != 0 && lane_index() == 0) atomicOr(&tile.mask(word, r), there);
  }
}

/// Lines up the aligned groups of one rank's experts, in order of experts; by a warp. put(e, start)
/// gets the start of each. Returns the end of the last.
template <class Put>
__device__ __forceinline__ int32_t line_up_groups(const RouteExperts& experts, int owner,
                                                  int32_t alignment, Put put) {
  const int lane = lane_index();
  int32_t end = 0;
  for (int first = 0; first < experts.num_experts; first += kWarpSize) {
    const int e = first + lane;
    const bool mine = e < experts.num_experts && experts.owner(e) == owner;
    const int32_t size = mine ? (experts.total(e) + alignment - 1) / alignment * alignment : 0;
    const int32_t sum = up_to_lane(size);
    if (mine) put(e, end + sum - size);
    end += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }
  return end;
}

/// Where the tokens of a tile of this rank go: writes plan.slot, first_row [R] and row [K] of each.
struct PlaceWriter {
  Layout layout;
  int topk;
  PlanView plan;
  int64_t tile_begin;  ///< the tile's first token in the batch

  /// id(i): expert of slot i of the tile's tokens. place(column, t): row (or slot) at the
  /// destination. By `threads` threads, of which this is number i.
  template <class Id, class Place>
  __device__ __forceinline__ void write(const RouteTile& tile, const RouteExperts& experts,
                                        int tokens, int i, int threads, Id id, Place place) const {
    const int num_ranks = tile.num_ranks;
    for (int j = i; j < tokens * num_ranks; j += threads) {
      const int t = j / num_ranks, r = j - t * num_ranks;
      const bool sent = tile.has(r, t);
      plan.slot[tile_begin * num_ranks + j] = sent ? place(r, t) : -1;
      if (layout == Layout::kToken) continue;
      int32_t row = -1;  // of the token's first slot there
      for (int k = 0; k < topk && sent && row < 0; ++k) {
        const int32_t e = id(t * topk + k);
        if (e >= 0 && experts.owner(e) == r) row = place(num_ranks + e, t);
      }
      plan.first_row[tile_begin * num_ranks + j] = row;
    }
    for (int j = i; j < tokens * topk; j += threads) {
      const int32_t e = id(j);
      int32_t row = -1;
      if (e >= 0)
        row = place(layout == Layout::kToken ? experts.owner(e) : num_ranks + e, j / topk);
      plan.row[tile_begin * topk + j] = row;
    }
  }
};

}  // namespace epcomm
