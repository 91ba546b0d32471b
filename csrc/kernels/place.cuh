// What kernels that place received tokens share: a token's row to every row of the layout that
// carries it, its expert ids and weights to the outputs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "epcomm/types.h"
#include "kernels/device.cuh"
#include "kernels/kernels.h"
#include "kernels/rows.cuh"

namespace epcomm {

/// What arrives is not trusted: an exchange that was cut short leaves whatever was in the memory,
/// and that must not become an address.
__device__ __forceinline__ int32_t valid_row(const PlaceArgs& args, int32_t row) {
  return row >= 0 && row < args.row_capacity ? row : -1;
}
__device__ __forceinline__ int32_t valid_expert(const PlaceArgs& args, int32_t expert) {
  return expert >= 0 && expert < args.dims.num_experts ? expert : -1;
}

/// Stores a job's part of the row at from, of which batch holds the first vectors, to the rows of
/// the target lanes; lane k holds slot k's row.
template <RowMemory kMemory = RowMemory::kConstant, int kVectors>
__device__ __forceinline__ void copy_payload(const PlaceArgs& args, const RowJob& job,
                                             const char* from, int32_t row, uint32_t targets,
                                             BatchOf<kVectors>& batch) {
  const int64_t row_bytes = args.rows.row_bytes;
  int v = job.begin + lane_index();
  constexpr int kStep = BatchOf<kVectors>::kStep;
  for (int at = job.begin; at < job.end; at += kStep) {
    for (uint32_t rest = targets; rest != 0;) {
      const int64_t to = __shfl_sync(kFullWarp, row, take_lowest(rest));
      batch.store(args.recv_x + to * row_bytes, v, job.end);
    }
    v += kStep;
    batch.template load<kMemory>(from, v, job.end);
  }
}

/// The first bytes of a word, at most 4, to any address.
EPCOMM_SELDOM inline __device__ void store_bytes(char* to, int bytes, uint32_t word) {
#pragma unroll 1
  for (int b = 0; b < min(bytes, 4); ++b) to[b] = static_cast<char>(word >> 8 * b);
}

/// Where the scales of received rows go, a word of 4 bytes at a time.
struct ScalePlaces {
  const PlaceArgs& args;
  int64_t word_step;  ///< bytes from a word of a row's scales to the next
  bool whole;         ///< words are stored as such; else their bytes are

  __device__ __forceinline__ explicit ScalePlaces(const PlaceArgs& args_)
      : args(args_), word_step(args_.scale_column_bytes) {
    whole = word_step != 0 || (args.rows.scale_bytes % 4 == 0 &&
                               reinterpret_cast<uintptr_t>(args.recv_scales) % 4 == 0);
    if (word_step == 0) word_step = 4;
  }
  /// Of the first word of row `to`.
  __device__ __forceinline__ char* of_row(int32_t to) const {
    if (args.scale_column_bytes == 0) return args.recv_scales + int64_t{to} * args.rows.scale_bytes;
    const int32_t group = to / args.group_rows;
    return args.recv_scales + int64_t{group} * (args.rows.scale_bytes / 4) * word_step +
           int64_t{to - group * args.group_rows} * 4;
  }
  /// Word w of a row that begins where of_row says.
  __device__ __forceinline__ void store(char* row, int w, uint32_t word) const {
    if (whole)
      *reinterpret_cast<uint32_t*>(row + w * word_step) = word;
    else
      store_bytes(row + w * word_step, args.rows.scale_bytes - w * 4, word);
  }
};

/// Copies `count` words to every row of the lanes `targets`; lane k holds slot k's row. Word u of
/// row `to` goes to where(to, u). They are loaded once, before any is stored: else each row would
/// wait for them anew.
template <class Word, class Where>
__device__ __forceinline__ void spread_words(const char* from, int count, int32_t row,
                                             uint32_t targets, Where where) {
  constexpr int kWords = sizeof(Word) < sizeof(uint4) ? 2 : 1;  // of a lane at a time
  for (int begin = 0; begin < count; begin += kWords * kWarpSize) {
    Word words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if (const int u = begin + i * kWarpSize + lane_index(); u < count)
        words[i] = reinterpret_cast<const Word*>(from)[u];
    for (uint32_t rest = targets; rest != 0;) {
      const int32_t to = __shfl_sync(kFullWarp, row, take_lowest(rest));
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if (const int u = begin + i * kWarpSize + lane_index(); u < count) {
          if constexpr (sizeof(Word) == sizeof(uint4))
            store_streaming(where(to, u), words[i]);
          else
            *where(to, u) = words[i];
        }
    }
  }
}

/// Copies the scales of a row to the rows of the target lanes, or to their places in columns.
__device__ __forceinline__ void place_scales(const PlaceArgs& args, const char* from, int32_t row,
                                             uint32_t targets) {
  const int bytes = args.rows.scale_bytes;
  if (args.scale_column_bytes != 0) {
    const int units = bytes / 4;
    return spread_words<uint32_t>(from, units, row, targets, [&](int32_t to, int u) {
      const int32_t group = to / args.group_rows;
      return reinterpret_cast<uint32_t*>(args.recv_scales +
                                         (int64_t{group} * units + u) * args.scale_column_bytes +
                                         int64_t{to - group * args.group_rows} * 4);
    });
  }
  auto in_rows = [&]<class Word>(Word) {
    constexpr int kSize = sizeof(Word);
    spread_words<Word>(from, bytes / kSize, row, targets, [&](int32_t to, int u) {
      return reinterpret_cast<Word*>(args.recv_scales + int64_t{to} * bytes + u * kSize);
    });
  };
  const uintptr_t bits = reinterpret_cast<uintptr_t>(args.recv_scales) |
                         reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(bytes);
  if (bits % sizeof(uint4) == 0)
    in_rows(uint4{});
  else if (bits % sizeof(uint32_t) == 0)
    in_rows(uint32_t{});
  else
    in_rows(uint8_t{});
}

/// Copies a job's part of a row to the distinct rows that carry the token; lane k holds slot k's
/// row. Returns the lanes that stand for these rows.
template <RowMemory kMemory = RowMemory::kConstant, int kVectors = kUnroll>
__device__ __forceinline__ uint32_t place_payload(const PlaceArgs& args, const RowJob& job,
                                                  const char* from, int32_t row) {
  // The payload is on its way before its rows are known.
  BatchOf<kVectors> batch;
  batch.template load<kMemory>(from, job.begin + lane_index(), job.end);
  const uint32_t firsts = distinct_rows(row);
  copy_payload<kMemory>(args, job, from, row, firsts, batch);
  return firsts;
}

/// The expert of a lane's slot, if this rank has it, else -1.
__device__ __forceinline__ int32_t local_expert(const PlaceArgs& args, const TokenSlots& slots) {
  return slots.row >= 0 && slots.expert >= 0 ? args.experts.local[slots.expert] : -1;
}

/// Local expert ids and weights: per slot in layout kToken, else per row. local: of local_expert.
__device__ __forceinline__ void place_outputs(const PlaceArgs& args, int64_t n,
                                              const TokenSlots& slots, int32_t local,
                                              bool is_first) {
  const int lane = lane_index(), topk = args.dims.topk;
  const bool here = slots.row >= 0 && slots.expert >= 0;
  float weight = here ? __fadd_rn(0.0f, slots.weight) : 0.0f;
  int64_t entry = n * topk + lane;
  bool writes = lane < topk;
  if (args.layout != Layout::kToken) {
    entry = slots.row;
    writes = is_first;
    // A row that several slots name has the sum of their weights, in the order of slots.
    weight = 0.0f;
    for (int k = 0; k < topk; ++k) {
      const int32_t row = __shfl_sync(kFullWarp, slots.row, k);
      const float other = __shfl_sync(kFullWarp, slots.weight, k);
      if (row == slots.row) weight = __fadd_rn(weight, other);
    }
  }
  if (!writes) return;
  if (args.recv_topk_idx != nullptr) store_index(args.recv_topk_idx, args.index_type, entry, local);
  if (args.recv_topk_weights != nullptr) args.recv_topk_weights[entry] = weight;
}
__device__ __forceinline__ void place_outputs(const PlaceArgs& args, int64_t n,
                                              const TokenSlots& slots, bool is_first) {
  place_outputs(args, n, slots, local_expert(args, slots), is_first);
}

/// Sets 4-byte words to value; by threads first, first + step, ...
__device__ __forceinline__ void fill_words(uint32_t* words, int64_t count, uint32_t value,
                                           int64_t first, int64_t step) {
  const int64_t vectors = reinterpret_cast<uintptr_t>(words) % sizeof(uint4) == 0 ? count / 4 : 0;
  // Not unrolled: stores wait for nothing, and code that is seldom run twice has to be loaded.
#pragma unroll 1
  for (int64_t i = first; i < vectors; i += step)
    reinterpret_cast<uint4*>(words)[i] = make_uint4(value, value, value, value);
#pragma unroll 1
  for (int64_t i = 4 * vectors + first; i < count; i += step) words[i] = value;
}

}  // namespace epcomm
