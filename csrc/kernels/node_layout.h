// The arithmetic of two-stage transfers: which ranks form a node, which rows go along a rail and
// where they lie at its other end, in which pieces they are sent and signalled. Used alike by host
// and device code and by the tests.
//
// dispatch  a token goes once to each remote node that wants it, along the rail; the rank there
//           forwards it to the ranks of its node. Row m of (source, node) is the m-th token, in
//           ascending order, that the source sends to that node.
// combine   the ranks of a node contribute rows to the forwarder, which adds them up and returns
//           row m of (source, node) to the source.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/token_layout.h"

namespace epcomm {

/// Ranks [0, n) form node 0, [n, 2n) node 1, and so on; the last node may be smaller.
struct NodeMap {
  int32_t num_ranks = 1;
  int32_t ranks_per_node = 0;  ///< n; 0 = all ranks are one node

  EPCOMM_HOST_DEVICE constexpr int stride() const {
    return ranks_per_node > 0 && ranks_per_node < num_ranks ? ranks_per_node : num_ranks;
  }
  EPCOMM_HOST_DEVICE constexpr int num_nodes() const {
    return (num_ranks + stride() - 1) / stride();
  }
  EPCOMM_HOST_DEVICE constexpr int node(int rank) const { return rank / stride(); }
  EPCOMM_HOST_DEVICE constexpr int local_rank(int rank) const { return rank % stride(); }
  EPCOMM_HOST_DEVICE constexpr int first(int node) const { return node * stride(); }
  EPCOMM_HOST_DEVICE constexpr int size(int node) const {
    const int rest = num_ranks - first(node);
    return rest < stride() ? rest : stride();
  }
  EPCOMM_HOST_DEVICE constexpr bool same_node(int a, int b) const { return node(a) == node(b); }

  /// The rank of a node that takes what `rank` sends to it, and returns the answer: the one of
  /// equal local_rank, or, where the node has fewer ranks, of local_rank modulo its size.
  EPCOMM_HOST_DEVICE constexpr int rail_peer(int rank, int node) const {
    return first(node) + local_rank(rank) % size(node);
  }
  /// `rank` forwards, inside its node, what source sends to that node.
  EPCOMM_HOST_DEVICE constexpr bool forwards(int rank, int source) const {
    return !same_node(rank, source) && rail_peer(source, node(rank)) == rank;
  }
  /// Sources that `rank` forwards for.
  EPCOMM_HOST_DEVICE constexpr int num_sources(int rank) const {
    return source_index(rank, num_ranks);
  }
  /// Number of a source among those that `rank` forwards for, by rank.
  EPCOMM_HOST_DEVICE constexpr int source_index(int rank, int source) const {
    int index = 0;
    for (int s = 0; s < source; ++s) index += forwards(rank, s) ? 1 : 0;
    return index;
  }
  /// The two may exchange rows: one forwards for the other.
  EPCOMM_HOST_DEVICE constexpr bool on_rail(int a, int b) const {
    return forwards(a, b) || forwards(b, a);
  }
  /// The remote node that `rank` serves at a step in [0, num_nodes - 1). Shifted by node and by
  /// local_rank: at every step the ranks of a rail serve different nodes, and the rails of a node
  /// start with different ones.
  EPCOMM_HOST_DEVICE constexpr int node_at(int rank, int step) const {
    const int others = num_nodes() - 1;
    return (node(rank) + 1 + (local_rank(rank) + step) % others) % num_nodes();
  }
};

/// Metadata of one row that waits to be forwarded: the record of MetaLayout, with PlanView::row for
/// all ranks of the node, then one word per rank of the node:
///   [3K + 1, 3K + 1 + node_size)  slot: index among the tokens which that rank receives, -1 = none
struct ForwardLayout {
  MetaLayout meta;
  size_t record_bytes;

  EPCOMM_HOST_DEVICE ForwardLayout(int topk, int node_size)
      : meta(topk),
        record_bytes(align_up(
            (3 * static_cast<size_t>(topk) + 1 + static_cast<size_t>(node_size)) * 4, 16)) {}

  /// A record of its own, at which the functions of `meta` take index 0.
  EPCOMM_HOST_DEVICE char* record(void* block, int64_t row) const {
    return static_cast<char*>(block) + static_cast<size_t>(row) * record_bytes;
  }
  EPCOMM_HOST_DEVICE int32_t* slot(void* record) const { return meta.token(record, 0) + 1; }
};

/// A sequence of rows cut into pieces that are signalled one by one.
struct Chunks {
  int32_t rows = 1;  ///< of a chunk; the last may have fewer

  /// rows_wanted, or more where max_rows would need more steps than a signal can count.
  EPCOMM_HOST_DEVICE static constexpr Chunks of(int64_t rows_wanted, int64_t max_rows) {
    const int64_t least = (max_rows + kMaxSteps - 1) / kMaxSteps;
    const int64_t rows = rows_wanted > least ? rows_wanted : least;
    return {static_cast<int32_t>(rows > 1 ? rows : 1)};
  }
  EPCOMM_HOST_DEVICE constexpr int32_t count(int64_t total) const {
    return static_cast<int32_t>((total + rows - 1) / rows);
  }
  EPCOMM_HOST_DEVICE constexpr int64_t begin(int32_t chunk) const { return int64_t{chunk} * rows; }
  EPCOMM_HOST_DEVICE constexpr int64_t end(int32_t chunk, int64_t total) const {
    const int64_t end = begin(chunk) + rows;
    return end < total ? end : total;
  }
  /// Chunks that must be there before the first num_rows rows are.
  EPCOMM_HOST_DEVICE constexpr int32_t covering(int64_t num_rows) const { return count(num_rows); }

  static constexpr int kStepBits = 16;
  static constexpr int64_t kMaxSteps = (int64_t{1} << kStepBits) - 1;
  /// What a signal holds after so many chunks of a call. Grows from call to call and from chunk to
  /// chunk, so that a wait asks for "at least".
  EPCOMM_HOST_DEVICE static constexpr uint64_t signal(uint64_t epoch, int32_t chunks) {
    return epoch << kStepBits | static_cast<uint64_t>(chunks);
  }
};

/// The counts of a plan, as all ranks know them, and where rows lie by them. A rank that forwards
/// takes its sources in the order of source(); all areas below are in that order.
struct NodePlan {
  NodeMap map;
  const int32_t* rank_count;  ///< PlanView::rank_count
  const int32_t* node_count;  ///< PlanView::node_count

  EPCOMM_HOST_DEVICE int32_t tokens(int source, int rank) const {
    return rank_count[source * map.num_ranks + rank];
  }
  EPCOMM_HOST_DEVICE int32_t node_tokens(int source, int node) const {
    return node_count[source * map.num_nodes() + node];
  }
  /// Tokens that a rank receives.
  EPCOMM_HOST_DEVICE int64_t received(int rank) const { return token_base(map.num_ranks, rank); }
  /// Index of the first token that rank receives from source.
  EPCOMM_HOST_DEVICE int64_t token_base(int source, int rank) const {
    int64_t base = 0;
    for (int s = 0; s < source; ++s) base += tokens(s, rank);
    return base;
  }
  /// Calls visit(source) for the sources that rank forwards for, by node_at() of the rank.
  template <class Visit>
  EPCOMM_HOST_DEVICE void for_each_source(int rank, Visit visit) const {
    for (int step = 0; step + 1 < map.num_nodes(); ++step) {
      const int node = map.node_at(rank, step);
      for (int s = map.first(node); s < map.first(node) + map.size(node); ++s)
        if (map.forwards(rank, s)) visit(s);
    }
  }
  /// First row of source in the forwarding area of rank; the area's rows for source = -1.
  EPCOMM_HOST_DEVICE int64_t forward_base(int rank, int source) const {
    int64_t base = 0;
    bool found = false;
    for_each_source(rank, [&](int s) {
      found = found || s == source;
      if (!found) base += node_tokens(s, map.node(rank));
    });
    return base;
  }
  EPCOMM_HOST_DEVICE int64_t forward_rows(int rank) const { return forward_base(rank, -1); }

  // Combine. What contributor sends to a rank of its node is one sequence of rows: its partial rows
  // for the sources that the rank forwards for, in their order, then those for the rank's own
  // tokens; each in the order of the contributor's received tokens.

  /// Position in that sequence of the first row for source, which may be the rank itself; the
  /// length of the sequence for source = -1.
  EPCOMM_HOST_DEVICE int64_t contribution_base(int rank, int contributor, int source) const {
    int64_t base = 0;
    bool found = false;
    for_each_source(rank, [&](int s) {
      found = found || s == source;
      if (!found) base += tokens(s, contributor);
    });
    return source == -1 ? base + tokens(rank, contributor) : base;
  }
  /// First row of contributor's sequence in the combine area of rank.
  EPCOMM_HOST_DEVICE int64_t contributor_base(int rank, int contributor) const {
    int64_t base = 0;
    for (int r = map.first(map.node(rank)); r < contributor; ++r)
      base += contribution_base(rank, r, -1);
    return base;
  }
  /// First row that node returned for the tokens of rank, in the combine area of rank; the area's
  /// rows for node = num_nodes. The rank's own node returns nothing.
  EPCOMM_HOST_DEVICE int64_t returned_base(int rank, int node) const {
    const int own = map.node(rank);
    int64_t base = contributor_base(rank, map.first(own) + map.size(own));
    for (int b = 0; b < node; ++b) base += b == own ? 0 : node_tokens(rank, b);
    return base;
  }
  EPCOMM_HOST_DEVICE int64_t combine_rows(int rank) const {
    return returned_base(rank, map.num_nodes());
  }
};

}  // namespace epcomm
