// Routing on the host: from the expert ids of a batch to counts, and from the counts of all ranks
// to slots and rows.
#pragma once

#include <cstdint>
#include <vector>

#include "core/expert_map.h"
#include "epcomm/types.h"
#include "kernels/node_layout.h"

namespace epcomm {

/// Index of the first token that destination receives from source.
int32_t token_base(const PlanView& view, int num_ranks, int source, int destination);
/// Index of source's first partial row from contributor, in contributor order.
int32_t partial_base(const PlanView& view, int num_ranks, int source, int contributor);

/// One rank's side of routing. Holds a reference to experts.
class HostRouting {
 public:
  /// forwarding: also routes to the nodes of map.
  HostRouting(const ExpertMap& experts, const NodeMap& map, bool forwarding, int rank,
              int max_tokens)
      : experts_(experts),
        map_(map),
        num_nodes_(forwarding ? map.num_nodes() : 0),
        rank_(rank),
        num_ranks_(map.num_ranks),
        max_tokens_(max_tokens) {}

  /// Counts that this rank announces: tokens to each rank, to each expert and, for forwarding, to
  /// each node. Leaves in args.plan.slot and node_slot each token's index among those that this
  /// rank sends to a destination.
  std::vector<int32_t> count(const RouteArgs& args) const;
  /// Fills slot, row, expert_offset, tokens_per_expert and num_recv from rank_count and
  /// expert_count of all ranks.
  void place(const RouteArgs& args) const;

 private:
  void expert_bases(const RouteArgs& args, std::vector<int32_t>& base) const;

  const ExpertMap& experts_;
  NodeMap map_;
  int num_nodes_;  // 0 = nothing is forwarded
  int rank_, num_ranks_, max_tokens_;
};

}  // namespace epcomm
