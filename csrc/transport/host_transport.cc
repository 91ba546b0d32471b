#include "transport/host_transport.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "core/host_rows.h"
#include "core/quant_rows.h"
#include "epcomm/error.h"

namespace epcomm {
namespace {

constexpr size_t kMaxDefaultArena = size_t{1} << 40;

// Memory is taken only where it is touched, so the default is generous: several worst cases at
// once, in the layout that needs most.
size_t arena_bytes(const TransportContext& context) {
  if (context.options.window_bytes != 0) return context.options.window_bytes;
  const Config& c = context.options.config;
  const size_t row = static_cast<size_t>(c.hidden) * 4 + kMaxTopk * 12 + 64;
  const size_t rows = static_cast<size_t>(context.bootstrap.size()) *
                      static_cast<size_t>(c.max_tokens) *
                      static_cast<size_t>(context.experts.max_local_experts());
  return std::min(align_up(4 * rows * row + (size_t{64} << 20), 4096), kMaxDefaultArena);
}

void store_index(void* array, IndexType type, int64_t i, int32_t value) {
  if (type == IndexType::kInt32)
    static_cast<int32_t*>(array)[i] = value;
  else
    static_cast<int64_t*>(array)[i] = value;
}

// bytes may be 0: nothing to copy, and no tensors.
void copy_row(void* to, int64_t to_row, const void* from, int64_t from_row, int32_t bytes) {
  if (bytes != 0)
    std::memcpy(static_cast<char*>(to) + to_row * bytes,
                static_cast<const char*>(from) + from_row * bytes, static_cast<size_t>(bytes));
}

Entry entry_of_plan(Operation operation, const Plan& plan) {
  Entry entry;
  entry.signature.operation = operation;
  entry.signature.layout = plan.layout;
  entry.signature.topk = plan.topk;
  entry.signature.expert_alignment = plan.expert_alignment;
  entry.signature.plan = static_cast<int32_t>(plan.result.epoch);
  return entry;
}

}  // namespace

HostTransport::HostTransport(const TransportContext& context, bool forwarding)
    : experts_(context.experts),
      config_(context.options.config),
      rank_(context.bootstrap.rank()),
      num_ranks_(context.bootstrap.size()),
      map_{num_ranks_, context.options.ranks_per_node},
      dims_{num_ranks_,
            config_.num_experts,
            experts_.local_experts(rank_),
            config_.topk,
            false,
            forwarding ? map_.num_nodes() : 0},
      routing_(experts_, map_, forwarding, rank_, config_.max_tokens),
      window_(make_host_window(context.bootstrap, ControlLayout(dims_).arena + arena_bytes(context),
                               context.options.timeout_s)),
      arena_(*window_, ControlLayout(dims_).arena),
      node_link_(*window_, forwarding ? map_ : NodeMap{num_ranks_}, rank_),
      rail_link_(*window_, map_, rank_),
      channel_(context.bootstrap, *window_, dims_, context.options.timeout_s) {
  caps_.token_layout = caps_.expert_layout = caps_.padded_layout = true;
  caps_.symmetric_outputs = true;
  caps_.link_counters = true;
  caps_.received_tokens = caps_.wait_times = true;
  caps_.forwards = forwarding;
  if (forwarding) return;  // rows are quantised before they are sent
  caps_.fused_quants =
      Caps::bit(Quant::kFp8) | Caps::bit(Quant::kFp8Ue8m0) | Caps::bit(Quant::kNvfp4);
  caps_.combine_quants = Caps::bit(Quant::kFp8);
}

RouteResult HostTransport::route(const RouteArgs& args) {
  channel_.begin(Operation::kRoute);
  const std::vector<int32_t> counts = routing_.count(args);
  Entry entry;
  entry.signature.operation = Operation::kRoute;
  entry.signature.layout = args.layout;
  entry.signature.topk = args.topk;
  entry.signature.expert_alignment = args.expert_alignment;
  entry.signature.dtype = args.dtype;
  entry.signature.row_bytes = args.row_bytes;
  entry.signature.scale_bytes = args.scale_bytes;
  entry.signature.weighted = args.weighted;
  channel_.enter_all(entry, counts.data());
  for (int s = 0; s < num_ranks_; ++s) {
    const int32_t* theirs = channel_.counts(s);
    std::copy_n(theirs, num_ranks_, args.plan.rank_count + int64_t{s} * num_ranks_);
    std::copy_n(theirs + num_ranks_, config_.num_experts,
                args.plan.expert_count + int64_t{s} * config_.num_experts);
    std::copy_n(theirs + num_ranks_ + config_.num_experts, dims_.num_nodes,
                args.plan.node_count + int64_t{s} * dims_.num_nodes);
  }
  routing_.place(args);

  RouteResult result;
  result.epoch = channel_.epoch();
  if (args.host_sync) {
    result.num_recv_tokens = *args.plan.num_recv;
    result.num_recv_rows = args.layout == Layout::kToken
                               ? result.num_recv_tokens
                               : args.plan.expert_offset[dims_.local_experts];
    result.tokens_per_expert.assign(args.plan.tokens_per_expert,
                                    args.plan.tokens_per_expert + dims_.local_experts);
  }
  return result;
}

// Peers write to these addresses: a wrong one must be refused here, not met there.
void HostTransport::check_outputs(const Plan& plan, const DispatchArgs& args) const {
  auto inside = [this](const void* p, int64_t bytes) {
    return bytes == 0 || arena_.contains(p, static_cast<size_t>(bytes));
  };
  const bool by_token = plan.layout == Layout::kToken;
  const int64_t tokens = *plan.view.num_recv;
  const int64_t rows = by_token ? tokens : plan.view.expert_offset[dims_.local_experts];
  EPCOMM_CHECK(args.recv_capacity >= tokens && args.row_capacity >= rows,
               "recv_capacity and row_capacity are " + std::to_string(args.recv_capacity) +
                   " and " + std::to_string(args.row_capacity) + "; this plan receives " +
                   std::to_string(tokens) + " tokens in " + std::to_string(rows) + " rows");
  EPCOMM_CHECK(
      inside(args.recv_x, rows * args.row_bytes) &&
          inside(args.recv_scales, rows * args.scale_bytes) &&
          inside(plan.view.recv_meta,
                 tokens * static_cast<int64_t>(MetaLayout(plan.topk).record_bytes) +
                     static_cast<int64_t>(forward_bytes(plan))),
      "recv_x, recv_scales and recv_meta must lie in memory from Buffer::allocate and hold "
      "what the plan receives");
}

Entry HostTransport::dispatch_entry(const Plan& plan, const DispatchArgs& args) const {
  if (args.needed_bytes == 0) check_outputs(plan, args);
  Entry entry = entry_of_plan(Operation::kDispatch, plan);
  entry.signature.dtype = args.dtype;
  entry.signature.row_bytes = args.row_bytes;
  entry.signature.scale_bytes = args.scale_bytes;
  entry.signature.weighted = args.topk_weights != nullptr;
  entry.full = args.needed_bytes != 0;
  entry.needed_bytes = args.needed_bytes;
  entry.free_bytes = args.free_bytes;
  if (entry.full == 0) {
    entry.rows = offset_of(args.recv_x);
    entry.scales = offset_of(args.recv_scales);
    entry.meta = offset_of(plan.view.recv_meta);
  }
  return entry;
}

Entry HostTransport::combine_entry(const Plan& plan, const CombineArgs& args) const {
  Entry entry = entry_of_plan(Operation::kCombine, plan);
  entry.signature.dtype = args.dtype;
  entry.signature.row_bytes = static_cast<int32_t>(partial_row_bytes(args));
  entry.signature.quant = args.quant;
  entry.signature.weighted = args.topk_weights != nullptr;
  entry.signature.by_token = args.by_token;
  return entry;
}

Allocation HostTransport::allocate_for(Entry& entry, size_t bytes) {
  Allocation piece = allocate(bytes);
  if (piece.data == nullptr) {
    entry.full = 1;
    entry.needed_bytes = bytes;
    entry.free_bytes = free_bytes();
  }
  return piece;
}

size_t HostTransport::partial_row_bytes(const CombineArgs& args) {
  return args.quant == Quant::kNone ? row_bytes(args) : fp8_row_bytes(args.hidden);
}

TokenRow HostTransport::own_token(const Plan& plan, const DispatchArgs& args, int64_t t) const {
  auto row = [t](const void* rows, int32_t bytes) {
    return rows == nullptr ? nullptr : static_cast<const char*>(rows) + t * bytes;
  };
  const int32_t x_bytes =
      args.quant == Quant::kNone ? args.row_bytes : config_.hidden * dtype_bytes(args.x_dtype);
  return {plan.view.topk_idx + t * plan.topk,
          plan.view.row + t * plan.topk,
          args.topk_weights == nullptr ? nullptr : args.topk_weights + t * plan.topk,
          static_cast<int32_t>(t),
          row(args.x, x_bytes),
          row(args.scales, args.scale_bytes)};
}

void HostTransport::deliver(const Plan& plan, const DispatchArgs& args, const TokenRow& token,
                            int peer, int64_t n) {
  const Entry& there = channel_.entry(peer);
  const MetaLayout meta(plan.topk);
  char* records = at(peer, there.meta);
  int32_t* record_row = meta.row(records, n);
  int64_t first = -1;
  for (int k = 0; k < plan.topk; ++k) {
    const int32_t expert = token.topk_idx[k];
    record_row[k] = expert >= 0 && experts_.rank(expert) == peer ? token.row[k] : -1;
    if (first < 0) first = record_row[k];
  }
  std::copy_n(token.topk_idx, plan.topk, meta.topk_idx(records, n));
  if (token.weights != nullptr)
    std::copy_n(token.weights, plan.topk, meta.topk_weights(records, n));
  *meta.token(records, n) = token.token;
  if (args.quant != Quant::kNone) {
    RowFormat format{args.quant, args.x_dtype, config_.hidden};
    if (args.quant == Quant::kNvfp4) format.global_scale = *args.global_scale;
    quantize_wire_row(format, token.x, at(peer, there.rows) + first * args.row_bytes,
                      at(peer, there.scales) + first * args.scale_bytes);
  } else {
    copy_row(at(peer, there.rows), first, token.x, 0, args.row_bytes);
    copy_row(at(peer, there.scales), first, token.scales, 0, args.scale_bytes);
  }
  LinkTraffic& link = link_to(counters_.dispatch, peer);
  ++link.rows;
  link.bytes += static_cast<uint64_t>(args.row_bytes + args.scale_bytes);
  link.meta_bytes += meta.record_bytes;
}

void HostTransport::place_received(const Plan& plan, const DispatchArgs& args) const {
  const int topk = plan.topk;
  const bool by_token = plan.layout == Layout::kToken;
  const MetaLayout meta(topk);
  const int64_t entries = by_token ? int64_t{args.recv_capacity} * topk : args.row_capacity;
  if (args.recv_topk_idx != nullptr)
    std::memset(args.recv_topk_idx, 0xff,
                static_cast<size_t>(entries) * static_cast<size_t>(args.index_type));
  if (args.recv_topk_weights != nullptr) std::fill_n(args.recv_topk_weights, entries, 0.0f);
  if (statistics_.received_tokens != nullptr)
    for (int e = 0; e < dims_.local_experts; ++e)
      statistics_.received_tokens[e] += plan.view.tokens_per_expert[e];

  for (int64_t n = 0; n < *plan.view.num_recv; ++n) {
    const int32_t* row = meta.row(plan.view.recv_meta, n);
    const int32_t* idx = meta.topk_idx(plan.view.recv_meta, n);
    const float* weights = meta.topk_weights(plan.view.recv_meta, n);
    int64_t first = -1;  // the row that the source wrote
    for (int k = 0; k < topk; ++k) {
      if (row[k] < 0) continue;
      const int64_t entry = by_token ? n * topk + k : row[k];
      if (args.recv_topk_idx != nullptr)
        store_index(args.recv_topk_idx, args.index_type, entry, experts_.local(idx[k]));
      if (args.recv_topk_weights != nullptr) args.recv_topk_weights[entry] += weights[k];
      if (first < 0) {
        first = row[k];
      } else if (row[k] != first) {
        copy_row(args.recv_x, row[k], args.recv_x, first, args.row_bytes);
        copy_row(args.recv_scales, row[k], args.recv_scales, first, args.scale_bytes);
      }
    }
  }
}

void HostTransport::write_partial(const Plan& plan, const CombineArgs& args, int64_t n,
                                  const float* weights, char* out) const {
  const size_t bytes = row_bytes(args);
  if (args.by_token) {
    std::memcpy(out, static_cast<const char*>(args.x) + static_cast<size_t>(n) * bytes, bytes);
    return;
  }
  const int32_t* row = MetaLayout(plan.topk).row(plan.view.recv_meta, n);
  std::vector<RowTerm> terms;
  for (int k = 0; k < plan.topk; ++k) {
    // Without weights a row counts once, however many slots share it.
    if (row[k] < 0 || (weights == nullptr && std::find(row, row + k, row[k]) != row + k)) continue;
    terms.push_back({static_cast<const char*>(args.x) + static_cast<size_t>(row[k]) * bytes,
                     weights == nullptr ? 1.0f : weights[k]});
  }
  if (args.quant != Quant::kNone)
    sum_to_fp8_row(args.dtype, terms, weights != nullptr, args.hidden, out);
  else if (weights == nullptr && terms.size() == 1)
    std::memcpy(out, terms[0].row, bytes);
  else
    sum_rows(args.dtype, terms, weights != nullptr, out, args.hidden);
}

}  // namespace epcomm
