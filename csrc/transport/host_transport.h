// What the transports between processes of one machine share: the window and the memory that it
// hands out, routing, and the steps on rows at both ends of a transfer. How rows get from one rank
// to another is what each of them adds.
//
// Window map: control area (ControlLayout), then the arena. Of the arena, each dispatch takes one
// piece for rows and one for metadata (the caller allocates them and keeps them as long as its
// tensors live); each combine takes one piece for partial rows and weights while it runs.
#pragma once

#include <cstdint>
#include <memory>

#include "core/window_arena.h"
#include "epcomm/window.h"
#include "kernels/token_layout.h"
#include "transport/host_channel.h"
#include "transport/host_link.h"
#include "transport/host_routing.h"
#include "transport/transport.h"

namespace epcomm {

/// One token on its way to a rank: what is written there of it.
struct TokenRow {
  const int32_t* topk_idx;  ///< [topk] global expert ids
  const int32_t* row;       ///< [topk] PlanView::row
  const float* weights;     ///< [topk], or null
  int32_t token;            ///< index on its source rank
  const char* x;            ///< as it is to arrive, or as DispatchArgs::quant finds it
  const char* scales;       ///< null where there are none
};

class HostTransport : public Transport {
 public:
  /// forwarding: ranks reach the windows of their own node, others by the rail. Else all of them.
  HostTransport(const TransportContext& context, bool forwarding);

  LinkCounters* link_counters() final { return &counters_; }
  void set_statistics(const Statistics& statistics) final {
    Transport::set_statistics(statistics);
    channel_.set_max_wait_ns(statistics.max_wait_ns);
  }
  const Caps& caps() const final { return caps_; }
  RouteResult route(const RouteArgs& args) final;
  Allocation allocate(size_t bytes) final { return arena_.allocate(bytes); }
  size_t free_bytes() const final { return arena_.largest_free(); }

 protected:
  /// The entry of a dispatch, once its outputs are known to lie where peers may write.
  Entry dispatch_entry(const Plan& plan, const DispatchArgs& args) const;
  /// The entry of a combine, without the memory that it announces.
  Entry combine_entry(const Plan& plan, const CombineArgs& args) const;
  /// Memory for the time of one call. No room: says so in the entry and returns data == nullptr.
  Allocation allocate_for(Entry& entry, size_t bytes);

  /// Token t of this rank.
  TokenRow own_token(const Plan& plan, const DispatchArgs& args, int64_t t) const;
  /// Writes a token's record and row to peer, as the n-th token that it receives.
  void deliver(const Plan& plan, const DispatchArgs& args, const TokenRow& token, int peer,
               int64_t n);
  /// What remains for the receiver: the tensors of expert ids and weights, and the copies of a
  /// token that several local experts want.
  void place_received(const Plan& plan, const DispatchArgs& args) const;
  /// out = what this rank adds to the n-th token that it received: the rounded sum over its rows.
  /// weights: [topk] of the token, or null.
  void write_partial(const Plan& plan, const CombineArgs& args, int64_t n, const float* weights,
                     char* out) const;

  /// Bytes of a partial row on its way.
  static size_t partial_row_bytes(const CombineArgs& args);
  static size_t row_bytes(const CombineArgs& args) {
    return static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
  }
  int32_t count(const PlanView& view, int source, int destination) const {
    return view.rank_count[source * num_ranks_ + destination];
  }
  int32_t token_base(const PlanView& view, int source, int destination) const {
    return epcomm::token_base(view, num_ranks_, source, destination);
  }
  int32_t partial_base(const PlanView& view, int source, int contributor) const {
    return epcomm::partial_base(view, num_ranks_, source, contributor);
  }
  char* at(int rank, uint64_t offset) const { return node_link_.at(rank, offset); }
  uint64_t offset_of(const void* p) const {
    return p == nullptr ? 0 : static_cast<uint64_t>(static_cast<const char*>(p) - at(rank_, 0));
  }
  /// Counter of what goes to peer.
  LinkTraffic& link_to(OperationTraffic& traffic, int peer) const {
    if (peer == rank_) return traffic.local;
    return map_.same_node(rank_, peer) ? traffic.node : traffic.rail;
  }

 private:
  void check_outputs(const Plan& plan, const DispatchArgs& args) const;

  const ExpertMap& experts_;
  Config config_;
  Caps caps_;

 protected:
  int rank_, num_ranks_;
  NodeMap map_;

 private:
  Dims dims_;
  HostRouting routing_;
  std::unique_ptr<Window> window_;
  WindowArena arena_;
  NodeLink node_link_;

 protected:
  RailLink rail_link_;
  LinkCounters counters_;
  HostChannel channel_;
};

}  // namespace epcomm
