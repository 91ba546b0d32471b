// Place, while rows arrive: a token of which peers store the row into its first place is copied to
// its other rows, and its expert ids and weights go to the outputs.
//
// Launch: by whole blocks of the kernel that sends (send.cu). Warps take kGroup tokens at a time. A
// row is bulk-loaded into shared memory in pieces, its scales with the first, and each lane stores
// them to its own slot's row; without bulk copies (before sm_90) rows go through registers.
// Memory order: kernels/arrivals.cuh. Each thread waits until its bulk stores are written before
// its block arrives at the end.
#pragma once

#include "kernels/arrivals.cuh"
#include "kernels/device.cuh"
#include "kernels/kernels.h"
#include "kernels/link.cuh"
#include "kernels/place.cuh"
#include "kernels/rows.cuh"

namespace epcomm {

constexpr int kPlaceGroup = 4;  ///< tokens that a warp has in flight
constexpr int kMaxPlaceWarps = 16;
constexpr int kMaxPlacePieceBytes = 8 << 10;

/// How a block is divided while it places; the host and the kernel agree on it.
struct PlaceShape {
  int32_t warps;
  int32_t pieces;       // of a row
  int32_t piece_bytes;  // the last may be shorter
  int32_t scale_bytes;  // that go with the first piece; 0 = scales go through registers
  int32_t stage_bytes;  // of a piece and its scales

  size_t shared_bytes() const {
    return static_cast<size_t>(warps * kPlaceGroup) * static_cast<size_t>(stage_bytes);
  }
};

/// One group of tokens: what lanes know of them, lane k of slot k, and where their rows are.
struct PlaceGroup {
  TokenSlots slots[kPlaceGroup];
  uint32_t firsts[kPlaceGroup];  // lanes that stand for the distinct rows; 0 = no token
  uint32_t others[kPlaceGroup];  // without that of the row which is there already
  int64_t first[kPlaceGroup];    // that row

  __device__ __forceinline__ void load(const PlaceArgs& args, int64_t n, int count) {
    const MetaLayout meta(args.dims.topk);
    const int lane = lane_index();
    int32_t row[kPlaceGroup];
#pragma unroll
    for (int u = 0; u < kPlaceGroup; ++u) {
      row[u] = -1;
      if (u >= count || n + u >= args.recv_capacity || lane >= meta.topk) continue;
      void* record = meta.row(args.plan.recv_meta, n + u);
      row[u] = meta.row(record, 0)[lane];
      slots[u].expert = valid_expert(args, meta.topk_idx(record, 0)[lane]);
      slots[u].weight = meta.topk_weights(record, 0)[lane];
    }
#pragma unroll
    for (int u = 0; u < kPlaceGroup; ++u) {
      slots[u].row = valid_row(args, row[u]);
      // Combine trusts the plan's records.
      if (slots[u].row != row[u]) meta.row(args.plan.recv_meta, n + u)[lane] = slots[u].row;
      others[u] = firsts[u] = distinct_rows(slots[u].row);
      first[u] = firsts[u] == 0
                     ? 0
                     : int64_t{__shfl_sync(kFullWarp, slots[u].row, take_lowest(others[u]))};
    }
  }
  /// Expert ids and weights of the rows, for tokens n, n + 1, ...
  __device__ __forceinline__ void place_ids(const PlaceArgs& args, int64_t n) const {
    int32_t local[kPlaceGroup];
#pragma unroll
    for (int u = 0; u < kPlaceGroup; ++u) local[u] = local_expert(args, slots[u]);
#pragma unroll
    for (int u = 0; u < kPlaceGroup; ++u)
      if (firsts[u] != 0)
        place_outputs(args, n + u, slots[u], local[u], (firsts[u] >> lane_index() & 1) != 0);
  }
};

/// The bulk copies of one warp.
struct PlaceStages {
  char* memory;         // kPlaceGroup stages
  BulkBarrier* loaded;  // [kPlaceGroup]
  uint32_t parity = 0;  // bit u: of stage u's next phase

  __device__ __forceinline__ void init() const {
    if (lane_index() == 0)
      for (int u = 0; u < kPlaceGroup; ++u) barrier_init(loaded + u);
    fence_barrier_init();
    __syncwarp();
  }
  /// Starts piece p of the rows that go on to others.
  __device__ __forceinline__ void load(const PlaceArgs& args, const PlaceShape& shape,
                                       const PlaceGroup& group, int p) const {
    // What the stages held has been stored.
    bulk_wait_read<0>();
    __syncwarp();
    if (lane_index() != 0) return;
    const int offset = p * shape.piece_bytes;
    const uint32_t bytes =
        static_cast<uint32_t>(min(shape.piece_bytes, args.rows.row_bytes - offset));
    const uint32_t scale_bytes = p == 0 ? static_cast<uint32_t>(shape.scale_bytes) : 0;
#pragma unroll
    for (int u = 0; u < kPlaceGroup; ++u) {
      if (group.others[u] == 0) continue;
      char* stage = memory + u * shape.stage_bytes;
      barrier_expect(loaded + u, bytes + scale_bytes);
      bulk_load(stage, args.recv_x + group.first[u] * args.rows.row_bytes + offset, bytes,
                loaded + u);
      if (scale_bytes != 0)
        bulk_load(stage + shape.piece_bytes,
                  args.recv_scales + group.first[u] * args.rows.scale_bytes, scale_bytes,
                  loaded + u);
    }
  }
  __device__ __forceinline__ void store(const PlaceArgs& args, const PlaceShape& shape,
                                        const PlaceGroup& group, int p) {
    const int offset = p * shape.piece_bytes;
    const uint32_t bytes =
        static_cast<uint32_t>(min(shape.piece_bytes, args.rows.row_bytes - offset));
#pragma unroll
    for (int u = 0; u < kPlaceGroup; ++u) {
      if (group.others[u] == 0) continue;
      barrier_wait(loaded + u, parity >> u & 1);
      parity ^= 1u << u;
      if ((group.others[u] >> lane_index() & 1) == 0) continue;
      const char* stage = memory + u * shape.stage_bytes;
      const int64_t row = group.slots[u].row;
      bulk_store(args.recv_x + row * args.rows.row_bytes + offset, stage, bytes);
      if (p == 0 && shape.scale_bytes != 0)
        bulk_store(args.recv_scales + row * args.rows.scale_bytes, stage + shape.piece_bytes,
                   static_cast<uint32_t>(shape.scale_bytes));
    }
    bulk_commit();
  }
};

/// The same through registers.
__device__ __forceinline__ void place_through_registers(const PlaceArgs& args,
                                                        const PlaceGroup& group) {
  const RowJob whole = {0, 0, args.rows.row_bytes / kVectorBytes, true};
#pragma unroll
  for (int u = 0; u < kPlaceGroup; ++u) {
    if (group.others[u] == 0) continue;
    const char* from = args.recv_x + group.first[u] * args.rows.row_bytes;
    Batch batch;
    batch.load<RowMemory::kArrived>(from, lane_index(), whole.end);
    copy_payload<RowMemory::kArrived>(args, whole, from, group.slots[u].row, group.others[u],
                                      batch);
  }
}

/// One warp's work, until all tokens of all sources are placed.
__device__ __forceinline__ void place_arrived(const SendArgs& send, const PlaceShape& shape,
                                              Arrivals& here, PlaceStages stages) {
  const PlaceArgs& args = send.place;
  if constexpr (kHasBulkCopies) stages.init();
  for (;;) {
    const ArrivedTokens tokens = take_arrived<kPlaceGroup>(send.link, here);
    if (tokens.count == 0) break;
    const int64_t n = int64_t{here.base[tokens.source]} + tokens.begin;
    PlaceGroup group;
    group.load(args, n, tokens.count);
    if constexpr (kHasBulkCopies) {
      fence_global_for_bulk();  // rows that were acquired are read by bulk loads
      stages.load(args, shape, group, 0);
      group.place_ids(args, n);
      stages.store(args, shape, group, 0);
      for (int p = 1; p < shape.pieces; ++p) {
        stages.load(args, shape, group, p);
        stages.store(args, shape, group, p);
      }
    } else {
      place_through_registers(args, group);
      group.place_ids(args, n);
    }
    if (args.rows.scale_bytes == 0 || shape.scale_bytes != 0) continue;
#pragma unroll
    for (int u = 0; u < kPlaceGroup; ++u)
      place_scales(args, args.recv_scales + group.first[u] * args.rows.scale_bytes,
                   group.slots[u].row, group.others[u]);
  }
  if constexpr (kHasBulkCopies) {
    bulk_wait_written();
    fence_global_for_bulk();
  }
}

}  // namespace epcomm
