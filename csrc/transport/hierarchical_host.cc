// The hierarchical transport on host windows: making it, and what its calls share.
#include "transport/hierarchical_host.h"

#include <algorithm>
#include <charconv>
#include <string>
#include <vector>

#include "transport/hierarchical_host_transport.h"

namespace epcomm {
namespace {

constexpr int64_t kDefaultChunkTokens = 64;

Chunks chunks_of(const TransportContext& context) {
  int64_t rows = kDefaultChunkTokens;
  for (const auto& [name, value] : context.options.transport_options) {
    const std::string text = "transport_options['" + name + "'] is '" + value + "'; expected ";
    EPCOMM_CHECK(name == "chunk_tokens", text + "the option chunk_tokens");
    const char* end = value.data() + value.size();
    const auto parsed = std::from_chars(value.data(), end, rows);
    EPCOMM_CHECK(parsed.ec == std::errc() && parsed.ptr == end && rows >= 1 && rows <= INT32_MAX,
                 text + "a number of tokens, at least 1");
  }
  return Chunks::of(rows, int64_t{context.bootstrap.size()} * context.options.config.max_tokens);
}

}  // namespace

HierarchicalHostTransport::HierarchicalHostTransport(const TransportContext& context)
    : HostTransport(context, true),
      chunks_(chunks_of(context)),
      node_(map_.node(rank_)),
      first_(map_.first(node_)),
      size_(map_.size(node_)) {}

// To all ranks, also those that wait for nothing from this one: whoever has not told holds up.
void HierarchicalHostTransport::tell_done() {
  for (int i = 1; i <= num_ranks_; ++i) channel_.signal_done((rank_ + i) % num_ranks_);
}

std::vector<HierarchicalHostTransport::Need> HierarchicalHostTransport::node_needs(
    Stage stage) const {
  std::vector<Need> needs;
  for (int r = first_; r < first_ + size_; ++r) needs.push_back({r, stage, 0});
  return needs;
}

// The way out: in each round one chunk to every remote node, one to the ranks of this node, and
// whatever has arrived meanwhile is forwarded.
void HierarchicalHostTransport::send_out(const Plan& plan, const Outbound& out) {
  const NodePlan counts = nodes(plan);
  struct Rail {
    int node;
    int64_t rows, token, sent;
  };
  struct Arrival {
    int source;
    int64_t base, rows;
    int32_t forwarded;  // chunks
  };
  std::vector<Rail> rails;
  std::vector<Arrival> arrivals;
  int32_t rounds = chunks_.count(plan.num_tokens);
  for (int step = 0; step + 1 < map_.num_nodes(); ++step) {
    const int node = map_.node_at(rank_, step);
    rails.push_back({node, counts.node_tokens(rank_, node), 0, 0});
  }
  counts.for_each_source(rank_, [&](int s) {
    arrivals.push_back({s, counts.forward_base(rank_, s), counts.node_tokens(s, node_), 0});
  });

  auto left = [&](const Arrival& a) { return a.forwarded < chunks_.count(a.rows); };
  auto here = [&](const Arrival& a) {
    return left(a) && channel_.reached(a.source, Stage::kRailOut, a.forwarded + 1);
  };
  auto forward_arrived = [&] {
    for (Arrival& a : arrivals)
      for (; here(a); ++a.forwarded)
        for (int64_t m = chunks_.begin(a.forwarded); m < chunks_.end(a.forwarded, a.rows); ++m) {
          const int32_t* slot =
              ForwardLayout(plan.topk, size_).slot(own_forward_record(plan, a.base + m));
          for (int j = 0; j < size_; ++j)
            if (slot[j] >= 0) out.forward(a.base + m, first_ + j, slot[j]);
        }
  };
  for (int32_t c = 0; c < rounds; ++c) {
    for (Rail& rail : rails) {
      if (c >= chunks_.count(rail.rows)) continue;
      for (; rail.sent < chunks_.end(c, rail.rows); ++rail.token) {
        const int32_t m = plan.view.node_slot[rail.token * map_.num_nodes() + rail.node];
        if (m >= 0) out.put(rail.token, rail.node, rail.sent++);
      }
      channel_.signal(map_.rail_peer(rank_, rail.node), Stage::kRailOut, c + 1);
    }
    for (int64_t t = chunks_.begin(c); t < chunks_.end(c, plan.num_tokens); ++t)
      for (int step = 0; step < size_; ++step) {
        const int peer = peer_at(step);
        const int32_t n = plan.view.slot[t * num_ranks_ + peer];
        if (n >= 0) out.deliver(t, peer, n);
      }
    forward_arrived();
  }
  while (std::any_of(arrivals.begin(), arrivals.end(), left)) {
    channel_.wait_until([&] { return std::any_of(arrivals.begin(), arrivals.end(), here); });
    forward_arrived();
  }
}

std::unique_ptr<Transport> make_hierarchical_host_transport(const TransportContext& context) {
  return std::make_unique<HierarchicalHostTransport>(context);
}

}  // namespace epcomm
