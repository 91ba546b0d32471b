// Moves rows between nodes once: docs/hierarchical.md. All arithmetic on nodes, slots and chunks is
// that of kernels/node_layout.h; rows reach other nodes by RailLink alone.
//
// Memory of one call, in the arena beside the caller's tensors:
//   dispatch  rows that wait to be forwarded (NodePlan::forward_base), then their scales; their
//             records lie behind those of the received tokens, in the plan's receive block, because
//             combine needs the slots that they name
//   combine   the combine area of NodePlan, then the weights of the received tokens, then the
//             weights that wait to be forwarded
//
// Signals (Stage), each the number of chunks that are written:
//   kRailOut   source -> forwarder       rows (dispatch) or weights (combine)
//   kNodeOut   in the node, combine      all weights for the peer are there
//   kNodeBack  contributor -> forwarder  partial rows, in the order of the sequence
//   kRailBack  forwarder -> source       sums
//
// Either call: hierarchical_host_dispatch.cc, hierarchical_host_combine.cc. What both need, among
// it the way from the sources to the ranks of the experts: hierarchical_host.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "transport/host_transport.h"

namespace epcomm {

class HierarchicalHostTransport final : public HostTransport {
 public:
  explicit HierarchicalHostTransport(const TransportContext& context);

  void dispatch(const Plan& plan, const DispatchArgs& args) override;
  void combine(const Plan& plan, const CombineArgs& args) override;
  size_t forward_bytes(const Plan& plan) const override {
    return static_cast<size_t>(nodes(plan).forward_rows(rank_)) *
           ForwardLayout(plan.topk, size_).record_bytes;
  }

 private:
  // Chunks of a stage that must be there.
  struct Need {
    int peer;
    Stage stage;
    int32_t chunks;
  };
  // What goes from sources to the ranks of the experts: rows (dispatch) or weights (combine).
  struct Outbound {
    /// Token t goes to `node`, as row m of those that this rank sends there.
    std::function<void(int64_t t, int node, int64_t m)> put;
    /// Token t goes to a rank of this node, as the n-th token that it receives.
    std::function<void(int64_t t, int peer, int64_t n)> deliver;
    /// So does what waits in a row of this rank's forwarding area.
    std::function<void(int64_t row, int peer, int64_t n)> forward;
  };

  NodePlan nodes(const Plan& plan) const {
    return {map_, plan.view.rank_count, plan.view.node_count};
  }
  // Offset in a window of the forward records, given that of the receive block.
  uint64_t forward_records(const Plan& plan, int rank, uint64_t recv_meta) const {
    return recv_meta +
           static_cast<uint64_t>(nodes(plan).received(rank)) * MetaLayout(plan.topk).record_bytes;
  }
  char* own_forward_record(const Plan& plan, int64_t row) const {
    return ForwardLayout(plan.topk, size_)
        .record(at(rank_, forward_records(plan, rank_, offset_of(plan.view.recv_meta))), row);
  }
  // Ranks of this node in the order in which this rank serves them, itself last.
  int peer_at(int step) const { return first_ + (map_.local_rank(rank_) + 1 + step) % size_; }
  bool all_there(const std::vector<Need>& needs) const {
    for (const Need& need : needs)
      if (!channel_.reached(need.peer, need.stage, need.chunks)) return false;
    return true;
  }
  void wait_for(const std::vector<Need>& needs) {
    channel_.wait_until([&] { return all_there(needs); });
  }
  /// A stage of no chunks, of all ranks of this node.
  std::vector<Need> node_needs(Stage stage) const;
  void tell_done();
  void send_out(const Plan& plan, const Outbound& out);

  // Of dispatch.
  void put_row(const Plan& plan, const DispatchArgs& args, int64_t t, int node, int64_t m);
  void forward_row(const Plan& plan, const DispatchArgs& args, const char* staging, int64_t row,
                   int peer, int64_t n);

  // Of combine.
  class Returns;
  const float* spread_weights(const Plan& plan, const float* topk_weights, size_t row_bytes);
  void contribute(const Plan& plan, const CombineArgs& args, const float* weights);
  void sum_up(const Plan& plan, const CombineArgs& args);

  Chunks chunks_;
  int node_, first_, size_;  // this rank's node, its first rank, its ranks
};

}  // namespace epcomm
