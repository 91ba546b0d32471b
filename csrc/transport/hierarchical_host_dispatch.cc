// The hierarchical transport on host windows: dispatch.
#include <algorithm>
#include <vector>

#include "transport/hierarchical_host_transport.h"

namespace epcomm {

void HierarchicalHostTransport::dispatch(const Plan& plan, const DispatchArgs& args) {
  Entry entry = dispatch_entry(plan, args);
  channel_.begin(Operation::kDispatch);
  Allocation staging;
  if (entry.full == 0) {
    const int64_t rows = nodes(plan).forward_rows(rank_);
    staging = allocate_for(entry, static_cast<size_t>(rows * (args.row_bytes + args.scale_bytes)));
    if (staging.data != nullptr) entry.forward = offset_of(staging.data);
  }
  channel_.enter_all(entry, nullptr);
  Outbound out;
  out.put = [&](int64_t t, int node, int64_t m) { put_row(plan, args, t, node, m); };
  out.deliver = [&](int64_t t, int peer, int64_t n) {
    deliver(plan, args, own_token(plan, args, t), peer, n);
  };
  out.forward = [&](int64_t row, int peer, int64_t n) {
    forward_row(plan, args, staging.data, row, peer, n);
  };
  send_out(plan, out);
  tell_done();
  wait_for(node_needs(Stage::kDone));
  place_received(plan, args);
}

void HierarchicalHostTransport::put_row(const Plan& plan, const DispatchArgs& args, int64_t t,
                                        int node, int64_t m) {
  const int peer = map_.rail_peer(rank_, node);
  const Entry& there = channel_.entry(peer);
  const NodePlan counts = nodes(plan);
  const TokenRow token = own_token(plan, args, t);
  const ForwardLayout layout(plan.topk, map_.size(node));
  std::vector<char> record(layout.record_bytes);
  std::copy_n(token.row, plan.topk, layout.meta.row(record.data(), 0));
  std::copy_n(token.topk_idx, plan.topk, layout.meta.topk_idx(record.data(), 0));
  if (token.weights != nullptr)
    std::copy_n(token.weights, plan.topk, layout.meta.topk_weights(record.data(), 0));
  *layout.meta.token(record.data(), 0) = token.token;
  std::copy_n(plan.view.slot + t * num_ranks_ + map_.first(node), map_.size(node),
              layout.slot(record.data()));

  const auto row = static_cast<uint64_t>(counts.forward_base(peer, rank_) + m);
  const auto row_bytes = static_cast<uint64_t>(args.row_bytes),
             scale_bytes = static_cast<uint64_t>(args.scale_bytes);
  const uint64_t scales =
      there.forward + static_cast<uint64_t>(counts.forward_rows(peer)) * row_bytes;
  rail_link_.put(peer, forward_records(plan, peer, there.meta) + row * layout.record_bytes,
                 record.data(), layout.record_bytes);
  rail_link_.put(peer, there.forward + row * row_bytes, token.x, row_bytes);
  rail_link_.put(peer, scales + row * scale_bytes, token.scales, scale_bytes);
  LinkTraffic& rail = counters_.dispatch.rail;
  ++rail.rows;
  rail.bytes += row_bytes + scale_bytes;
  rail.meta_bytes += layout.record_bytes;
}

void HierarchicalHostTransport::forward_row(const Plan& plan, const DispatchArgs& args,
                                            const char* staging, int64_t row, int peer, int64_t n) {
  const ForwardLayout layout(plan.topk, size_);
  char* record = own_forward_record(plan, row);
  const char* scales = staging + nodes(plan).forward_rows(rank_) * args.row_bytes;
  deliver(plan, args,
          {layout.meta.topk_idx(record, 0), layout.meta.row(record, 0),
           args.topk_weights == nullptr ? nullptr : layout.meta.topk_weights(record, 0),
           *layout.meta.token(record, 0), staging + row * args.row_bytes,
           scales + row * args.scale_bytes},
          peer, n);
}

}  // namespace epcomm
