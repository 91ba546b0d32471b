// Where rows lie that go along a rail between GPUs: the memory of a rank that its rail peers put
// into, and what travels with a row. The arithmetic of nodes is that of node_layout.h. No count of
// a batch is in any place here: areas have room for whole batches, so that nothing is asked for
// before a row is sent, and the host need not know what is received.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/node_layout.h"
#include "kernels/token_layout.h"

namespace epcomm {

/// A row on its way to another node: its bytes, its scales, then a record in 4-byte words:
///   [0, 3K + 1)         as in MetaLayout, with PlanView::row for all ranks of the node
///   [3K + 1, + n)       slot: index among the tokens which each rank of the node receives, -1 =
///   none [3K + 1 + n, + n)   first_row: the token's first row in each rank's layout, -1 = none
struct RailRow {
  MetaLayout meta;
  int32_t node_size;
  size_t scales_at, record_at, bytes;

  EPCOMM_HOST_DEVICE RailRow(int topk, int node_size_, int row_bytes, int scale_bytes)
      : meta(topk),
        node_size(node_size_),
        scales_at(static_cast<size_t>(row_bytes)),
        record_at(align_up(scales_at + static_cast<size_t>(scale_bytes), 16)),
        bytes(align_up(
            record_at +
                (3 * static_cast<size_t>(topk) + 1 + 2 * static_cast<size_t>(node_size_)) * 4,
            size_t{kBulkLine})) {}
  EPCOMM_HOST_DEVICE char* record(char* row) const { return row + record_at; }
  EPCOMM_HOST_DEVICE int32_t* slot(char* row) const { return meta.token(record(row), 0) + 1; }
  EPCOMM_HOST_DEVICE int32_t* first_row(char* row) const { return slot(row) + node_size; }
};

/// What stays of each row at the rank that has forwarded it, for the combines of the plan, in
/// 4-byte words; PlanView::forwarded:
///   [0, n)       slot, as in RailRow
///   [n, n + K)   topk_idx: global expert ids
///   [n + K]      token: its index on the source rank
struct ForwardedLayout {
  int32_t topk, node_size, max_tokens;

  EPCOMM_HOST_DEVICE int32_t row_words() const { return node_size + topk + 1; }
  EPCOMM_HOST_DEVICE int64_t words(int num_sources) const {
    return int64_t{num_sources} * max_tokens * row_words();
  }
  /// Row m of a source, by its number among those that the rank forwards for.
  EPCOMM_HOST_DEVICE int32_t* slot(int32_t* block, int source, int64_t m) const {
    return block + (int64_t{source} * max_tokens + m) * row_words();
  }
  EPCOMM_HOST_DEVICE int32_t* topk_idx(int32_t* block, int source, int64_t m) const {
    return slot(block, source, m) + node_size;
  }
  EPCOMM_HOST_DEVICE int32_t* token(int32_t* block, int source, int64_t m) const {
    return topk_idx(block, source, m) + topk;
  }
};

/// Areas and signals in the window of every rank, alike on all; from offset `begin` on.
///   in   what rail peers put here. dispatch: rows to forward, an area for each source by
///        NodeMap::source_index; combine: sums for this rank's tokens, an area for each node
///   out  what this rank puts from. dispatch: an area for each node; combine: for each source
/// Rows of an area are signalled in chunks. The weights of a combine go to every rank.
struct RailLayout {
  static constexpr size_t kWeightPiece = 8 << 10;  ///< bytes that are put together

  Chunks chunks;
  int32_t num_ranks, max_tokens, topk, max_chunks, weight_pieces;
  size_t area_bytes;
  size_t signals, counts, weight_signals, weights, in, out, end;

  /// row_bytes: of the widest row with its scales.
  EPCOMM_HOST_DEVICE RailLayout(const NodeMap& map, int max_tokens_, int topk_, size_t row_bytes,
                                Chunks chunks_, size_t begin)
      : chunks(chunks_), num_ranks(map.num_ranks), max_tokens(max_tokens_), topk(topk_) {
    int areas = map.num_nodes();
    for (int r = 0; r < num_ranks; ++r)
      areas = map.num_sources(r) > areas ? map.num_sources(r) : areas;
    if (map.num_nodes() == 1) areas = 0;
    const size_t n = static_cast<size_t>(areas), ranks = static_cast<size_t>(num_ranks);
    max_chunks = chunks.count(max_tokens);
    weight_pieces = static_cast<int32_t>((source_weight_bytes() + kWeightPiece - 1) / kWeightPiece);
    const RailRow widest(topk, map.size(0), static_cast<int>(align_up(row_bytes, 16)), 0);
    area_bytes = align_up(static_cast<size_t>(max_tokens) * widest.bytes, kBlockAlignment);
    signals = align_up(begin, kBlockAlignment);
    counts = signals + n * static_cast<size_t>(max_chunks) * sizeof(uint64_t);
    weight_signals = counts + n * sizeof(uint64_t);
    weights =
        align_up(weight_signals + ranks * static_cast<size_t>(weight_pieces) * sizeof(uint64_t),
                 kBlockAlignment);
    in = weights + ranks * source_weight_bytes();
    out = in + n * area_bytes;
    end = out + n * area_bytes;
  }
  /// uint64: epoch of the last call in which this chunk of an area has arrived.
  EPCOMM_HOST_DEVICE size_t signal(int area, int chunk) const {
    return signals + (static_cast<size_t>(area) * static_cast<size_t>(max_chunks) +
                      static_cast<size_t>(chunk)) *
                         sizeof(uint64_t);
  }
  /// uint64 of a source: rail_count() of the last dispatch.
  EPCOMM_HOST_DEVICE size_t count(int area) const {
    return counts + static_cast<size_t>(area) * sizeof(uint64_t);
  }
  /// uint64: epoch of the last combine in which this piece of a rank's weights has arrived.
  EPCOMM_HOST_DEVICE size_t weight_signal(int source, int piece) const {
    return weight_signals + (static_cast<size_t>(source) * static_cast<size_t>(weight_pieces) +
                             static_cast<size_t>(piece)) *
                                sizeof(uint64_t);
  }
  /// float [max_tokens, topk] of a rank's tokens, with the topk of the call.
  EPCOMM_HOST_DEVICE size_t source_weights(int source) const {
    return weights + static_cast<size_t>(source) * source_weight_bytes();
  }
  EPCOMM_HOST_DEVICE size_t in_area(int area) const {
    return in + static_cast<size_t>(area) * area_bytes;
  }
  EPCOMM_HOST_DEVICE size_t out_area(int area) const {
    return out + static_cast<size_t>(area) * area_bytes;
  }

 private:
  EPCOMM_HOST_DEVICE size_t source_weight_bytes() const {
    return align_up(static_cast<size_t>(max_tokens) * static_cast<size_t>(topk) * sizeof(float),
                    kBlockAlignment);
  }
};

/// The value of RailLayout::count: how many rows come in the call of this epoch. max_tokens is
/// below 2^25 wherever there are two ranks.
constexpr int kRailCountBits = 25;
EPCOMM_HOST_DEVICE constexpr uint64_t rail_count(uint64_t epoch, int32_t rows) {
  return epoch << kRailCountBits | static_cast<uint32_t>(rows);
}
EPCOMM_HOST_DEVICE constexpr int32_t rail_rows(uint64_t count) {
  return static_cast<int32_t>(count & ((uint64_t{1} << kRailCountBits) - 1));
}

/// What the ranks of a node store into each other's window, from its start.
///   signals   uint64 of each contributor, by local_rank: epoch of the last combine of which its
///             partial rows are stored here
///   partial   partial rows: of each contributor, for this rank's tokens, then for those of each
///             source that it forwards for (NodeMap::source_index); in the order in which the
///             contributor has received them
struct NodeWindowLayout {
  int32_t num_areas, max_tokens;
  size_t partial, end;

  /// row_bytes: of the widest row.
  EPCOMM_HOST_DEVICE NodeWindowLayout(const NodeMap& map, int max_tokens_, size_t row_bytes)
      : num_areas(1), max_tokens(max_tokens_) {
    for (int r = 0; r < map.num_ranks; ++r)
      num_areas = map.num_sources(r) + 1 > num_areas ? map.num_sources(r) + 1 : num_areas;
    partial = align_up(static_cast<size_t>(map.size(0)) * sizeof(uint64_t), size_t{4096});
    end = align_up(partial + static_cast<size_t>(map.size(0)) * static_cast<size_t>(num_areas) *
                                 static_cast<size_t>(max_tokens) * row_bytes,
                   size_t{4096});
  }
  EPCOMM_HOST_DEVICE static size_t signal(int contributor) {
    return static_cast<size_t>(contributor) * sizeof(uint64_t);
  }
  /// First partial row; area 0 = for the rank's own tokens, 1 + i = for those of source i.
  EPCOMM_HOST_DEVICE size_t partial_rows(int contributor, int area, size_t row_bytes) const {
    return partial + (static_cast<size_t>(contributor) * static_cast<size_t>(num_areas) +
                      static_cast<size_t>(area)) *
                         static_cast<size_t>(max_tokens) * row_bytes;
  }
};

}  // namespace epcomm
