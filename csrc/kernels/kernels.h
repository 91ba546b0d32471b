// Host entry points of the device code that all GPU transports share: routing and rows. Each
// function launches on the given stream and returns; errors of the launch throw epcomm::Error. All
// sizes are run-time values. R = num_ranks, E = num_experts, L = local_experts, T = num_tokens, K =
// topk.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "epcomm/types.h"
#include "kernels/mark.h"
#include "kernels/token_layout.h"

namespace epcomm {

constexpr int kTileTokens = 256;  ///< tokens that one block of the routing kernels handles

constexpr int num_tiles(int64_t num_tokens) {
  return static_cast<int>((num_tokens + kTileTokens - 1) / kTileTokens);
}

/// First tile of chunk c of a batch cut into chunks; chunk_tile(tiles, chunks, chunks) == tiles.
/// The first chunk is small, because nothing hides its packing (or, in a combine, its sum, which
/// comes last); each next one is three times as large: its packing hides behind the exchange
/// before.
EPCOMM_HOST_DEVICE constexpr int chunk_tile(int tiles, int chunks, int c) {
  if (c <= 0) return 0;
  if (c >= chunks) return tiles;
  int64_t before = 1, all = 1;
  for (int i = 0; i < chunks; ++i) {
    if (i < c) before *= 3;
    all *= 3;
  }
  return static_cast<int>((tiles * (before - 1) + all - 2) / (all - 1));
}

/// First token of chunk c of a batch of T tokens: the same on all ranks that know T.
EPCOMM_HOST_DEVICE constexpr int64_t chunk_begin(int64_t num_tokens, int chunks, int c) {
  const int tiles = static_cast<int>((num_tokens + kTileTokens - 1) / kTileTokens);
  const int64_t begin = int64_t{chunk_tile(tiles, chunks, c)} * kTileTokens;
  return begin < num_tokens ? begin : num_tokens;
}

/// Owner and local id of every expert, in device memory.
struct DeviceExperts {
  const int32_t* rank;   ///< [E]
  const int32_t* local;  ///< [E]
};

/// What the routing kernels work on.
struct RouteKernelArgs {
  Dims dims;
  int32_t rank;
  int32_t max_tokens;
  int32_t num_tokens;
  int32_t chunks;  ///< 1..kMaxChunks
  Layout layout;
  int32_t expert_alignment;
  IndexType index_type;
  int32_t signature[AnnounceLayout::kSignatureWords];  ///< copied to announce
  const void* topk_idx;
  DeviceExperts experts;
  PlanView plan;
  /// Null, or pinned host memory [3]: 1 + position of a bad id, the id, K. Written if there is one.
  volatile int32_t* bad_index;
  int32_t* tile_count;       ///< scratch [num_tiles(T), R + E]
  int32_t* announce;         ///< [AnnounceLayout::words()] of this rank
  const int32_t* announced;  ///< [R, words()] of all ranks; read by launch_assign
  Mark mark;                 ///< made by the next kernel that is launched with these arguments
};

/// Step 1. Copies ids to plan.topk_idx (an id outside [-1, E) becomes -1 and is reported in
/// announce), counts distinct tokens per rank (by chunk and in all) and per expert into announce,
/// and per tile into tile_count. Deterministic.
void launch_count(const RouteKernelArgs& args, cudaStream_t stream);

/// Step 2, with the announcements of all ranks: fills plan.slot, row, rank_count, expert_count,
/// expert_offset, tokens_per_expert and num_recv. An expert that a token names
/// twice gets the token once; both slots get the same row.
void launch_assign(const RouteKernelArgs& args, cudaStream_t stream);

/// Rows in memory: bytes per row and where they are. scale_bytes 0 = no scales.
struct RowSpec {
  int32_t row_bytes;
  int32_t scale_bytes;
};

/// Where the rows for one destination rank go: row i of that rank's tokens (in source order) is
/// written at x + i * row_bytes (scales, meta alike). The arrays may be a send buffer or final
/// memory.
struct PackTarget {
  char* x;
  char* scales;
  char* meta;  ///< MetaLayout records
};
constexpr int kMaxPackRanks = 64;  ///< ranks that one launch handles
struct PackArgs {
  Dims dims;
  RowSpec rows;
  int32_t rank;
  int32_t chunk, chunks;  ///< only tokens of this chunk
  int32_t num_tokens;
  const char* x;
  const char* scales;
  const float* topk_weights;  ///< null: weights of the records are left unwritten
  DeviceExperts experts;
  PlanView plan;
  PackTarget target[kMaxPackRanks];      ///< [R]
  uint64_t destinations = ~uint64_t{0};  ///< bit r: what goes to rank r is packed
  bool records = true;                   ///< false: no records, target[r].meta unused
  Mark mark;
};

/// Copies rows, scales and metadata records of one chunk to where its destinations are packed. The
/// number of rows is read on the device. One warp or more per row, 16-byte accesses.
void launch_pack(const PackArgs& args, int num_sms, cudaStream_t stream);

/// The receive side of a dispatch. The number of received tokens is read on the device.
struct PlaceArgs {
  Dims dims;
  RowSpec rows;
  Layout layout;
  int32_t rank;
  int32_t chunk = 0, chunks = 1;  ///< only tokens of this chunk of their sources' batches
  IndexType index_type;
  int32_t recv_capacity;
  int32_t row_capacity;
  DeviceExperts experts;
  PlanView plan;
  /// Where received token n's payload, scales and record are: source s's tokens start at
  /// source[s].x, in order. Null x: payload and scales are in recv_x and recv_scales already, in
  /// the token's first row. Null meta: the record is in plan.recv_meta already.
  PackTarget source[kMaxPackRanks];
  char* recv_x;
  char* recv_scales;
  int64_t scale_column_bytes = 0;  ///< not 0: recv_scales is as DispatchArgs::recv_scale_columns
  int32_t group_rows = 0;          ///< of each of its matrices
  void* recv_topk_idx;             ///< may be null
  float* recv_topk_weights;        ///< may be null
  /// Entries of recv_topk_idx and recv_topk_weights that no token has become "none", to the end of
  /// their capacity; with chunk 0.
  bool clears = false;
  Mark mark;
};
/// Fills recv_topk_idx and recv_topk_weights with "none", to the end of their capacity: for callers
/// whose peers write some of them before place could clear the others.
void launch_clear_outputs(const PlaceArgs& args, cudaStream_t stream);
/// Copies each received token to every distinct row that carries it, its record to plan.recv_meta,
/// and its expert ids and weights to the outputs. Reads counts and bases from plan.rank_count.
void launch_place(const PlaceArgs& args, int num_sms, cudaStream_t stream);
/// Adds tokens_per_expert [L] to Statistics::received_tokens.
void launch_count_received(const Statistics& statistics, const int32_t* tokens_per_expert,
                           int local_experts, cudaStream_t stream);

/// The receive side where whole batches were gathered instead: token t of source s is entry
/// s * capacity + t of every array; those without a slot here are passed over.
struct GatheredArgs {
  PlaceArgs place;  ///< source[] unused
  int32_t capacity;
  const int32_t* announced;  ///< for the sources' num_tokens
  const char* x;
  const char* scales;
  const int32_t* topk_idx;    ///< [R, capacity, K]
  const int32_t* row;         ///< [R, capacity, K]
  const int32_t* slot;        ///< [R, capacity, R]
  const float* topk_weights;  ///< [R, capacity, K] or null
};
/// As launch_place, from gathered batches; also writes the records of plan.recv_meta.
void launch_place_gathered(const GatheredArgs& args, int num_sms, cudaStream_t stream);

/// The expert side of a combine: one partial row for each token received from each source rank.
struct PartialArgs {
  Dims dims;
  int32_t rank;
  Dtype dtype;
  int32_t hidden;
  int32_t chunk, chunks;
  uint64_t sources = ~uint64_t{0};  ///< bit s: partials of source s are made
  const char* x;                    ///< rows of the layout
  /// Rows that x may have, and tokens that a source may have. What a record says beyond them is
  /// not there: records are those of a dispatch that may have moved nothing, refused or lost.
  int32_t row_capacity, max_tokens;
  bool by_token;  ///< as CombineArgs::by_token
  PlanView plan;
  const float* topk_weights[kMaxPackRanks];  ///< [R]: [tokens, K] of source s; all null = none
  char* target[kMaxPackRanks];  ///< [R]: partial row of token i (in source order) of source s at
                                ///< target[s] + i * row
  Mark mark;
};
/// partial = the formula of Buffer::combine, fp32 sums, rounded to dtype.
void launch_partials(const PartialArgs& args, int num_sms, cudaStream_t stream);

/// As launch_partials, for a reduce-scatter: partial of token t of source s (rounded to dtype, then
/// as fp32) at dense + (s * capacity + t) * hidden; the caller has zeroed dense. target, chunk
/// unused.
void launch_dense_partials(const PartialArgs& args, float* dense, int capacity, int num_sms,
                           cudaStream_t stream);
/// out[t] = round(sum[t] + bias[t]) for num_tokens rows of fp32 sums.
void launch_finish(const float* sum, const void* bias, void* out, Dtype dtype, int64_t num_elements,
                   cudaStream_t stream);

/// The owner's side of a combine.
struct SumArgs {
  Dims dims;
  int32_t rank;
  Dtype dtype;
  int32_t hidden;
  int32_t num_tokens;
  int32_t chunk, chunks;
  PlanView plan;
  const char* partial[kMaxPackRanks];  ///< [R]: partial row i (of this rank's tokens at rank r) at
                                       ///< partial[r] + i * row
  const void* bias;                    ///< or null
  void* out;
  Mark mark;
};
/// out[t] = round(sum over r ascending of partials, then + bias), in fp32.
void launch_sum(const SumArgs& args, int num_sms, cudaStream_t stream);

}  // namespace epcomm
