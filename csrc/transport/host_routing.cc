#include "transport/host_routing.h"

#include <algorithm>

#include "kernels/token_layout.h"

namespace epcomm {

int32_t token_base(const PlanView& view, int num_ranks, int source, int destination) {
  int32_t base = 0;
  for (int s = 0; s < source; ++s) base += view.rank_count[s * num_ranks + destination];
  return base;
}

int32_t partial_base(const PlanView& view, int num_ranks, int source, int contributor) {
  int32_t base = 0;
  for (int r = 0; r < contributor; ++r) base += view.rank_count[source * num_ranks + r];
  return base;
}

namespace {

// An expert named twice by one token counts once: the first slot that names the expert of slot k.
int first_naming(const int32_t* topk_idx, int k) {
  return static_cast<int>(std::find(topk_idx, topk_idx + k, topk_idx[k]) - topk_idx);
}

}  // namespace

std::vector<int32_t> HostRouting::count(const RouteArgs& args) const {
  std::vector<int32_t> counts(static_cast<size_t>(num_ranks_ + experts_.num_experts() + num_nodes_),
                              0);
  int32_t* per_rank = counts.data();
  int32_t* per_expert = per_rank + num_ranks_;
  int32_t* per_node = per_expert + experts_.num_experts();
  for (int t = 0; t < args.num_tokens; ++t) {
    const int32_t* idx = args.plan.topk_idx + int64_t{t} * args.topk;
    int32_t* slot = args.plan.slot + int64_t{t} * num_ranks_;
    int32_t* node_slot = args.plan.node_slot + int64_t{t} * num_nodes_;
    std::fill_n(slot, num_ranks_, -1);
    std::fill_n(node_slot, num_nodes_, -1);
    for (int k = 0; k < args.topk; ++k) {
      if (idx[k] < 0 || first_naming(idx, k) < k) continue;
      const int owner = experts_.rank(idx[k]);
      if (slot[owner] < 0) slot[owner] = per_rank[owner]++;
      ++per_expert[idx[k]];
      if (num_nodes_ == 0) continue;
      const int node = map_.node(owner);
      if (node_slot[node] < 0) node_slot[node] = per_node[node]++;
    }
  }
  return counts;
}

// Row at which the owner's group of each expert starts for tokens of this rank.
void HostRouting::expert_bases(const RouteArgs& args, std::vector<int32_t>& base) const {
  std::vector<int64_t> end(static_cast<size_t>(num_ranks_), 0);  // of the groups so far, per rank
  const int64_t padded_rows = int64_t{num_ranks_} * max_tokens_;
  const int num_experts = experts_.num_experts();
  for (int e = 0; e < num_experts; ++e) {
    const size_t owner = static_cast<size_t>(experts_.rank(e));
    int64_t before = 0, total = 0;
    for (int s = 0; s < num_ranks_; ++s) {
      const int32_t n = args.plan.expert_count[int64_t{s} * num_experts + e];
      if (s < rank_) before += n;
      total += n;
    }
    const bool padded = args.layout == Layout::kPadded;
    const int64_t start = padded ? experts_.local(e) * padded_rows : end[owner];
    base[static_cast<size_t>(e)] = static_cast<int32_t>(start + before);
    end[owner] = padded
                     ? start + padded_rows
                     : static_cast<int64_t>(align_up(static_cast<size_t>(start + total),
                                                     static_cast<size_t>(args.expert_alignment)));
    if (static_cast<int>(owner) == rank_) {
      const int local = experts_.local(e);
      args.plan.tokens_per_expert[local] = static_cast<int32_t>(total);
      args.plan.expert_offset[local] = static_cast<int32_t>(start);
    }
  }
  args.plan.expert_offset[experts_.local_experts(rank_)] =
      static_cast<int32_t>(end[static_cast<size_t>(rank_)]);
}

void HostRouting::place(const RouteArgs& args) const {
  std::vector<int32_t> next(static_cast<size_t>(experts_.num_experts()));
  expert_bases(args, next);
  std::vector<int32_t> base(static_cast<size_t>(num_ranks_));
  for (int r = 0; r < num_ranks_; ++r)
    base[static_cast<size_t>(r)] = token_base(args.plan, num_ranks_, rank_, r);
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const int32_t* idx = args.plan.topk_idx + t * args.topk;
    int32_t* row = args.plan.row + t * args.topk;
    int32_t* slot = args.plan.slot + t * num_ranks_;
    for (int r = 0; r < num_ranks_; ++r)
      if (slot[r] >= 0) slot[r] += base[static_cast<size_t>(r)];
    for (int k = 0; k < args.topk; ++k) {
      if (idx[k] < 0)
        row[k] = -1;
      else if (args.layout == Layout::kToken)
        row[k] = slot[experts_.rank(idx[k])];
      else if (const int first = first_naming(idx, k); first < k)
        row[k] = row[first];
      else
        row[k] = next[static_cast<size_t>(idx[k])]++;
    }
  }
  *args.plan.num_recv = token_base(args.plan, num_ranks_, num_ranks_, rank_);
}

}  // namespace epcomm
