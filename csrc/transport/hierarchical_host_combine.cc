// The hierarchical transport on host windows: combine.
#include <cstring>
#include <vector>

#include "core/host_rows.h"
#include "transport/hierarchical_host_transport.h"

namespace epcomm {
namespace {

// Where the weights lie behind the partial rows, in the memory of a combine.
struct WeightArea {
  size_t received, forward, bytes;
  WeightArea(const NodePlan& counts, int rank, size_t token_bytes, size_t partial_bytes)
      : received(align_up(partial_bytes, kBlockAlignment)),
        forward(received + static_cast<size_t>(counts.received(rank)) * token_bytes),
        bytes(forward + static_cast<size_t>(counts.forward_rows(rank)) * token_bytes) {}
};

size_t partial_bytes(const NodePlan& counts, int rank, size_t row_bytes) {
  return static_cast<size_t>(counts.combine_rows(rank)) * row_bytes;
}

}  // namespace

void HierarchicalHostTransport::combine(const Plan& plan, const CombineArgs& args) {
  channel_.begin(Operation::kCombine);
  const size_t token_bytes =
      args.topk_weights == nullptr ? 0 : static_cast<size_t>(plan.topk) * sizeof(float);
  const WeightArea area(nodes(plan), rank_, token_bytes,
                        partial_bytes(nodes(plan), rank_, row_bytes(args)));
  Entry entry = combine_entry(plan, args);
  const Allocation piece = allocate_for(entry, area.bytes);
  if (piece.data != nullptr) entry.rows = offset_of(piece.data);
  channel_.enter_all(entry, nullptr);
  const float* weights = nullptr;
  if (args.topk_weights != nullptr)
    weights = spread_weights(plan, args.topk_weights, row_bytes(args));
  contribute(plan, args, weights);
  tell_done();
  sum_up(plan, args);
}

// The weights of every token to the ranks that hold its rows, the way that the rows went. Returns
// those of the tokens that this rank received, [received, topk].
const float* HierarchicalHostTransport::spread_weights(const Plan& plan, const float* topk_weights,
                                                       size_t row_bytes) {
  const NodePlan counts = nodes(plan);
  const size_t bytes = static_cast<size_t>(plan.topk) * sizeof(float);
  auto area = [&](int rank) {
    return WeightArea(counts, rank, bytes, partial_bytes(counts, rank, row_bytes));
  };
  auto of_token = [&](int64_t t) { return topk_weights + t * plan.topk; };
  auto store = [&](int peer, int64_t n, const void* from) {
    std::memcpy(
        at(peer, channel_.entry(peer).rows + area(peer).received + static_cast<size_t>(n) * bytes),
        from, bytes);
    link_to(counters_.combine, peer).meta_bytes += bytes;
  };
  const char* forward = at(rank_, channel_.entry(rank_).rows + area(rank_).forward);
  Outbound out;
  out.put = [&](int64_t t, int node, int64_t m) {
    const int peer = map_.rail_peer(rank_, node);
    const auto row = static_cast<uint64_t>(counts.forward_base(peer, rank_) + m);
    rail_link_.put(peer, channel_.entry(peer).rows + area(peer).forward + row * bytes, of_token(t),
                   bytes);
    counters_.combine.rail.meta_bytes += bytes;
  };
  out.deliver = [&](int64_t t, int peer, int64_t n) { store(peer, n, of_token(t)); };
  out.forward = [&](int64_t row, int peer, int64_t n) {
    store(peer, n, forward + static_cast<size_t>(row) * bytes);
  };
  send_out(plan, out);
  for (int r = first_; r < first_ + size_; ++r) channel_.signal(r, Stage::kNodeOut);
  wait_for(node_needs(Stage::kNodeOut));
  return reinterpret_cast<const float*>(
      at(rank_, channel_.entry(rank_).rows + area(rank_).received));
}

// What a forwarder does in combine: adds up the partial rows of its node and returns the sums,
// source by source and chunk by chunk.
class HierarchicalHostTransport::Returns {
 public:
  Returns(HierarchicalHostTransport& transport, const Plan& plan, const CombineArgs& args)
      : t_(transport), plan_(plan), args_(args), counts_(transport.nodes(plan)) {
    counts_.for_each_source(t_.rank_, [&](int s) {
      if (counts_.node_tokens(s, t_.node_) > 0) sources_.push_back(s);
    });
    if (!finished()) look_ahead();
  }
  bool finished() const { return next_source_ == sources_.size(); }
  bool ready() const { return !finished() && t_.all_there(needs_); }
  /// Returns the next chunk, which must be ready.
  void step() {
    const int source = sources_[next_source_];
    const int64_t total = counts_.node_tokens(source, t_.node_);
    const int64_t begin = t_.chunks_.begin(chunk_), end = t_.chunks_.end(chunk_, total);
    const size_t bytes = row_bytes(args_);
    std::vector<char> sums(static_cast<size_t>(end - begin) * bytes);
    const char* area = t_.at(t_.rank_, t_.channel_.entry(t_.rank_).rows);
    std::vector<RowTerm> terms;
    for (int64_t m = begin; m < end; ++m) {
      const int32_t* slot = slots(m);
      terms.clear();
      for (int j = 0; j < t_.size_; ++j)
        if (slot[j] >= 0)
          terms.push_back({area + static_cast<size_t>(row_shift_[static_cast<size_t>(j)] +
                                                      position(j, slot[j])) *
                                      bytes,
                           1.0f});
      sum_rows(args_.dtype, terms, false, sums.data() + static_cast<size_t>(m - begin) * bytes,
               args_.hidden);
    }
    const auto row = static_cast<uint64_t>(counts_.returned_base(source, t_.node_) + begin);
    t_.rail_link_.put(source, t_.channel_.entry(source).rows + row * bytes, sums.data(),
                      sums.size());
    t_.channel_.signal(source, Stage::kRailBack, chunk_ + 1);
    t_.counters_.combine.rail.rows += static_cast<uint64_t>(end - begin);
    t_.counters_.combine.rail.bytes += sums.size();
    if (++chunk_ == t_.chunks_.count(total)) {
      chunk_ = 0;
      ++next_source_;
    }
    if (!finished()) look_ahead();
  }

 private:
  const int32_t* slots(int64_t m) const {
    return ForwardLayout(plan_.topk, t_.size_)
        .slot(t_.own_forward_record(plan_, forward_base_ + m));
  }
  // Of a row in the sequence of its contributor.
  int64_t position(int j, int32_t slot) const {
    return slot + sequence_shift_[static_cast<size_t>(j)];
  }
  // What must be there before the next chunk can be added up.
  void look_ahead() {
    const int source = sources_[next_source_];
    forward_base_ = counts_.forward_base(t_.rank_, source);
    row_shift_.clear();
    sequence_shift_.clear();
    for (int r = t_.first_; r < t_.first_ + t_.size_; ++r) {
      row_shift_.push_back(counts_.contributor_base(t_.rank_, r));
      sequence_shift_.push_back(counts_.contribution_base(t_.rank_, r, source) -
                                counts_.token_base(source, r));
    }
    std::vector<int64_t> rows(static_cast<size_t>(t_.size_), 0);
    const int64_t total = counts_.node_tokens(source, t_.node_);
    for (int64_t m = t_.chunks_.begin(chunk_); m < t_.chunks_.end(chunk_, total); ++m)
      for (int j = 0; j < t_.size_; ++j)
        if (slots(m)[j] >= 0) rows[static_cast<size_t>(j)] = position(j, slots(m)[j]) + 1;
    needs_.clear();
    for (int j = 0; j < t_.size_; ++j)
      if (const int64_t n = rows[static_cast<size_t>(j)]; n > 0)
        needs_.push_back({t_.first_ + j, Stage::kNodeBack, t_.chunks_.covering(n)});
  }

  HierarchicalHostTransport& t_;
  const Plan& plan_;
  const CombineArgs& args_;
  NodePlan counts_;
  std::vector<int> sources_;
  size_t next_source_ = 0;
  int32_t chunk_ = 0;
  int64_t forward_base_ = 0;
  std::vector<int64_t> row_shift_, sequence_shift_;  // by local rank
  std::vector<Need> needs_;
};

// This rank's partial rows to the ranks of its node; between chunks, sums go back to the sources.
void HierarchicalHostTransport::contribute(const Plan& plan, const CombineArgs& args,
                                           const float* weights) {
  const NodePlan counts = nodes(plan);
  const size_t bytes = row_bytes(args);
  Returns returns(*this, plan, args);
  for (int step = 0; step < size_; ++step) {
    const int peer = peer_at(step);
    char* out = at(peer, channel_.entry(peer).rows) +
                static_cast<size_t>(counts.contributor_base(peer, rank_)) * bytes;
    const int64_t total = counts.contribution_base(peer, rank_, -1);
    int64_t done = 0;
    auto contribute_to = [&](int source) {
      const int64_t begin = counts.token_base(source, rank_),
                    end = begin + counts.tokens(source, rank_);
      for (int64_t n = begin; n < end; ++n, out += bytes) {
        write_partial(plan, args, n, weights == nullptr ? nullptr : weights + n * plan.topk, out);
        if (++done % chunks_.rows != 0 && done != total) continue;
        channel_.signal(peer, Stage::kNodeBack, chunks_.covering(done));
        while (returns.ready()) returns.step();
      }
    };
    counts.for_each_source(peer, contribute_to);
    contribute_to(peer);
    LinkTraffic& link = link_to(counters_.combine, peer);
    link.rows += static_cast<uint64_t>(total);
    link.bytes += static_cast<uint64_t>(total) * bytes;
  }
  while (!returns.finished()) {
    channel_.wait_until([&] { return returns.ready(); });
    returns.step();
  }
}

// y of this rank's tokens, chunk by chunk: the own node's partial rows are added up and rounded as
// the other nodes' were, then nodes in ascending order, then the bias.
void HierarchicalHostTransport::sum_up(const Plan& plan, const CombineArgs& args) {
  const NodePlan counts = nodes(plan);
  const size_t bytes = row_bytes(args);
  const char* area = at(rank_, channel_.entry(rank_).rows);
  const int num_nodes = map_.num_nodes();
  std::vector<char> own_sum(bytes);
  std::vector<RowTerm> ranks, terms;
  auto row = [&](int64_t index) { return area + static_cast<size_t>(index) * bytes; };
  // Position, in the sequence from rank r, of the row for a token of this rank.
  auto position = [&](int r, int32_t slot) {
    return counts.contribution_base(rank_, r, rank_) + slot - counts.token_base(rank_, r);
  };
  for (int32_t c = 0; c < chunks_.count(plan.num_tokens); ++c) {
    const int64_t begin = chunks_.begin(c), end = chunks_.end(c, plan.num_tokens);
    std::vector<Need> needs;
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* slot = plan.view.slot + t * num_ranks_;
      const int32_t* node_slot = plan.view.node_slot + t * num_nodes;
      for (int r = first_; r < first_ + size_; ++r)
        if (slot[r] >= 0)
          needs.push_back({r, Stage::kNodeBack, chunks_.covering(position(r, slot[r]) + 1)});
      for (int b = 0; b < num_nodes; ++b)
        if (b != node_ && node_slot[b] >= 0)
          needs.push_back({map_.rail_peer(rank_, b), Stage::kRailBack,
                           chunks_.covering(int64_t{node_slot[b]} + 1)});
    }
    wait_for(needs);
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* slot = plan.view.slot + t * num_ranks_;
      const int32_t* node_slot = plan.view.node_slot + t * num_nodes;
      terms.clear();
      for (int b = 0; b < num_nodes; ++b) {
        if (node_slot[b] < 0) continue;
        if (b != node_) {
          terms.push_back({row(counts.returned_base(rank_, b) + node_slot[b]), 1.0f});
          continue;
        }
        ranks.clear();
        for (int r = first_; r < first_ + size_; ++r)
          if (slot[r] >= 0)
            ranks.push_back({row(counts.contributor_base(rank_, r) + position(r, slot[r])), 1.0f});
        sum_rows(args.dtype, ranks, false, own_sum.data(), args.hidden);
        terms.push_back({own_sum.data(), 1.0f});
      }
      const size_t at_token = static_cast<size_t>(t) * bytes;
      if (args.bias != nullptr)
        terms.push_back({static_cast<const char*>(args.bias) + at_token, 1.0f});
      sum_rows(args.dtype, terms, false, static_cast<char*>(args.out) + at_token, args.hidden);
    }
  }
}

}  // namespace epcomm
