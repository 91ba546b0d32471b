// Rows between GPUs go once to each node that wants them, over NVSHMEM along the rail, and are
// forwarded there by stores; sums come back the same way. docs/hierarchical.md; kernels/rail.h.
//
// Two windows, each alike on all ranks that share it. In NVSHMEM's symmetric memory, of all ranks:
//   control   ControlLayout: the inboxes of the peers
//   rail      RailLayout: what is put to other nodes, and what comes from them
// In memory that the GPUs of one node load and store, and no other:
//   node      NodeWindowLayout: partial rows of a combine
//   arena     what Buffer::allocate hands out: received rows, and the plans' receive blocks
#include "transport/hierarchical_gpu.h"

#include <algorithm>
#include <charconv>
#include <exception>
#include <string>
#include <utility>

#include "core/call_fields.h"
#include "core/checks.h"
#include "core/subgroup.h"
#include "core/vote.h"
#include "core/window_arena.h"
#include "kernels/rail.h"
#include "transport/gpu_link_transport.h"
#include "transport/gpu_nvshmem.h"
#include "transport/gpu_nvshmem_windows.h"
#include "transport/gpu_window.h"

namespace epcomm {
namespace {

// Rows that are put together: enough for a network card to be busy with few messages, few enough
// that many warps have some.
constexpr int64_t kChunkTokens = 4;
constexpr int kDispatchSms = 24, kCombineSms = 32;
constexpr int64_t kMostPutBytes = int64_t{1} << 30;

struct Options {
  int64_t chunk_tokens = kChunkTokens;
};

Options read_options(const TransportContext& context) {
  Options options;
  for (const auto& [name, value] : context.options.transport_options) {
    const std::string text = "transport_options['" + name + "'] is '" + value + "'; expected ";
    EPCOMM_CHECK(name == "chunk_tokens", text + "the option chunk_tokens");
    const char* end = value.data() + value.size();
    const auto parsed = std::from_chars(value.data(), end, options.chunk_tokens);
    EPCOMM_CHECK(parsed.ec == std::errc() && parsed.ptr == end && options.chunk_tokens >= 1 &&
                     options.chunk_tokens <= INT32_MAX,
                 text + "a number of tokens, at least 1");
  }
  return options;
}

NodeMap map_of(const TransportContext& context) {
  return {context.bootstrap.size(), context.options.ranks_per_node};
}

struct Layouts {
  ControlLayout control;
  SmallLayout widest;  // for its row_bytes: no staging of small batches is taken
  RailLayout rail;
  NodeWindowLayout node;

  Layouts(const TransportContext& context, const Options& options)
      : control(gpu_dims(context)),
        widest(small_layout(context, 0, true)),
        rail(map_of(context), context.options.config.max_tokens, context.options.config.topk,
             widest.row_bytes, chunks_of(context, options, widest.row_bytes), control.arena),
        node(map_of(context), context.options.config.max_tokens, widest.row_bytes) {}

 private:
  static Chunks chunks_of(const TransportContext& context, const Options& options, size_t row) {
    const int64_t most = context.options.config.max_tokens;
    const auto record = RailRow(kMaxTopk, kMaxLinkRanks, 0, 0).bytes;
    const auto fit = kMostPutBytes / static_cast<int64_t>(row + record);
    return {static_cast<int32_t>(
        std::clamp<int64_t>(options.chunk_tokens, 1, std::min(most, std::max<int64_t>(fit, 1))))};
  }
};

// The windows of the ranks of this rank's node, which is all that this rank stores to. Collective.
std::shared_ptr<GpuWindow> make_node_window(const TransportContext& context, const NodeMap& map,
                                            size_t bytes) {
  Bootstrap& all = context.bootstrap;
  const int node = map.node(all.rank());
  SubgroupBootstrap group(all, map.first(node), map.size(node));
  std::shared_ptr<GpuWindow> window;
  std::string failure;
  try {
    window = make_gpu_window(group, bytes, context.options.timeout_s);
  } catch (const PeerLost&) {
    throw;
  } catch (const std::exception& e) {
    failure = e.what();
  }
  group.finish();
  throw_failures("making the windows of the nodes", gather_failures(all, failure),
                 "ranks_per_node says which ranks form a node");
  return window;
}

class HierarchicalGpuTransport final : public GpuLinkTransport {
 public:
  HierarchicalGpuTransport(const TransportContext& context, const Layouts& layouts,
                           std::shared_ptr<NvshmemWindow> rails, std::shared_ptr<GpuWindow> node)
      : GpuLinkTransport(context, nvshmem_link_kernels(), nvshmem_windows(rails, context.bootstrap),
                         layouts.control, layouts.widest, false),
        map_(map_of(context)),
        layouts_(layouts),
        first_(map_.first(map_.node(rank_))),
        size_(map_.size(map_.node(rank_))),
        rails_(std::move(rails)),
        node_(std::move(node)),
        arena_(*node_, layouts_.node.end) {
    caps_.symmetric_outputs = caps_.forwards = true;
    caps_.column_scales = false;
  }
  ~HierarchicalGpuTransport() override {
    drain();
    // Calls end when their puts have landed, here and at the peers, except where a peer was lost.
    try {
      watchdog_.check();
    } catch (const std::exception&) {
      rails_->abandon();
    }
  }

  RouteResult route(const RouteArgs& args) override;
  void dispatch(const Plan& plan, const DispatchArgs& args) override;
  void combine(const Plan& plan, const CombineArgs& args) override;
  Allocation allocate(size_t bytes) override { return arena_.allocate(bytes); }
  size_t free_bytes() const override { return arena_.largest_free(); }

 private:
  void route_more(const RouteArgs& args) override;
  RailArgs rail(Operation operation) const;
  void store_partials(const Plan& plan, const CombineArgs& args);

  NodeMap map_;
  Layouts layouts_;
  int first_, size_;  // of this rank's node
  std::shared_ptr<NvshmemWindow> rails_;
  std::shared_ptr<GpuWindow> node_;
  WindowArena arena_;
};

RouteResult HierarchicalGpuTransport::route(const RouteArgs& args) {
  RouteArgs routed = args;
  // dispatch refuses a row that is too wide. It does so on all ranks, if none of them is ahead of
  // what tells whether all have such rows.
  routed.ahead = args.ahead && fits_slot(args.row_bytes, args.scale_bytes);
  return GpuLinkTransport::route(routed);
}

// Which tokens go to which node needs no word from other ranks.
void HierarchicalGpuTransport::route_more(const RouteArgs& args) {
  launch_node_slots(map_, rank_, args.num_tokens, args.topk, route_.experts(), args.plan,
                    static_cast<cudaStream_t>(args.stream));
}

RailArgs HierarchicalGpuTransport::rail(Operation operation) const {
  RailArgs rail{};
  rail.link = link(operation);
  rail.map = map_;
  rail.rail = layouts_.rail;
  for (int r = 0; r < size_; ++r) rail.node_window[first_ + r] = node_->peer(r);
  return rail;
}

void HierarchicalGpuTransport::dispatch(const Plan& plan, const DispatchArgs& args) {
  check();
  check_fits_slot(args.row_bytes, args.scale_bytes);
  check_outputs(plan, args, arena_);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, stream);
  RailDispatchArgs k{};
  k.rail = rail(Operation::kDispatch);
  k.rail.link.token = ++tokens_;
  LinkEntry& entry = k.rail.link.entry;
  describe_dispatch(entry, plan, args, arena_);
  k.dims = dims(plan.topk);
  k.rows = {args.row_bytes, args.scale_bytes};
  k.num_tokens = plan.num_tokens;
  k.x = static_cast<const char*>(args.x);
  k.scales = static_cast<const char*>(args.scales);
  k.topk_weights = args.topk_weights;
  k.records = !args.replay || args.topk_weights != nullptr;
  k.experts = route_.experts();
  k.plan = plan.view;
  k.first_row = plan.layout == Layout::kToken ? plan.view.slot : plan.view.first_row;
  k.room = guessed_room(plan, args);
  const int num_sms = args.num_sms > 0 ? args.num_sms : kDispatchSms;
  const PlaceArgs place = route_.place_args(plan, args);
  // With counts on the host every entry of layout kToken that the caller gets has a token. Cleared
  // before the ranks of the node are let in.
  const bool has_room = makes_room(args);
  if (has_room && (plan.layout != Layout::kToken || !plan.host_sync))
    launch_clear_outputs(place, stream);
  launch_rail_dispatch(k, num_sms, stream);
  if (args.needed_bytes != 0) {
    call.end();
    wait_entered(k.rail.link.token);
    throw WindowFull(rank_, args.needed_bytes, args.free_bytes);
  }
  if (has_room && (plan.layout != Layout::kToken || leaves_slots(entry, args)))
    launch_place(place, num_sms, stream);
  call.end();
  // The host has waited in this dispatch already, so that it may as well learn of a full window or
  // a mismatch here; the rows are on their way meanwhile.
  if (plan.host_sync && !args.replay && !plan.result.unsettled) wait_entered(k.rail.link.token);
}

void HierarchicalGpuTransport::combine(const Plan& plan, const CombineArgs& args) {
  check();
  const int64_t row_bytes = int64_t{args.hidden} * dtype_bytes(args.dtype);
  check_fits_slot(row_bytes, 0);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, stream);
  RailEnterArgs enter{};
  enter.rail = rail(Operation::kCombine);
  LinkEntry& entry = enter.rail.link.entry;
  describe_plan(entry, plan);
  entry_field(entry, CallField::kDtype) = static_cast<int32_t>(args.dtype);
  entry_field(entry, CallField::kRowBytes) = static_cast<int32_t>(row_bytes);
  entry_field(entry, CallField::kWeighted) = args.topk_weights != nullptr ? 1 : 0;
  entry_field(entry, CallField::kRows) = args.by_token ? 1 : 0;
  entry.num_tokens = plan.num_tokens;
  // Where a token has one row and that lies in the window, the ranks of the node load the rows from
  // where they are. Others are summed here first, and stored where they are wanted.
  const bool one_row = args.by_token || plan.layout == Layout::kToken;
  const bool pushed = !one_row || !arena_.contains(args.x, 1);
  if (!pushed) entry.rows = arena_.offset(args.x);
  entry.pushed = pushed ? 1 : 0;
  enter.topk = plan.topk;
  enter.num_tokens = plan.num_tokens;
  enter.topk_weights = args.topk_weights;
  launch_rail_enter(enter, stream);
  if (pushed) store_partials(plan, args);
  RailCombineArgs k{};
  k.rail = enter.rail;
  k.node = layouts_.node;
  k.dims = dims(plan.topk);
  k.dtype = args.dtype;
  k.hidden = args.hidden;
  k.num_tokens = plan.num_tokens;
  k.plan = plan.view;
  k.weighted = args.topk_weights != nullptr;
  k.experts = route_.experts();
  k.bias = args.bias;
  k.out = args.out;
  launch_rail_combine(k, args.num_sms > 0 ? args.num_sms : kCombineSms, stream);
  call.end();
}

// For each source, into the window of the rank of this node that adds them up: the source itself,
// or what forwards for it.
void HierarchicalGpuTransport::store_partials(const Plan& plan, const CombineArgs& args) {
  const auto row = static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
  PartialArgs partials{};
  partials.dims = dims(plan.topk);
  partials.rank = rank_;
  partials.dtype = args.dtype;
  partials.hidden = args.hidden;
  partials.by_token = args.by_token;
  partials.chunks = 1;
  partials.x = static_cast<const char*>(args.x);
  partials.row_capacity = most_rows(plan);
  partials.max_tokens = config_.max_tokens;
  partials.plan = plan.view;
  for (int s = 0; s < num_ranks_; ++s) {
    const bool near = map_.same_node(rank_, s);
    const int to = near ? s : map_.rail_peer(s, map_.node(rank_));
    const int area = near ? 0 : 1 + map_.source_index(to, s);
    partials.target[s] =
        node_->peer(to - first_) + layouts_.node.partial_rows(rank_ - first_, area, row);
    if (args.topk_weights != nullptr)
      partials.topk_weights[s] =
          reinterpret_cast<const float*>(rails_->own() + layouts_.rail.source_weights(s));
  }
  launch_partials(partials, args.num_sms > 0 ? args.num_sms : kCombineSms,
                  static_cast<cudaStream_t>(args.stream));
}

}  // namespace

std::unique_ptr<Transport> make_hierarchical_gpu_transport(const TransportContext& context) {
  EPCOMM_CHECK(context.bootstrap.size() <= kMaxLinkRanks,
               "the hierarchical transport takes at most " + std::to_string(kMaxLinkRanks) +
                   " ranks on GPUs; this group has " + std::to_string(context.bootstrap.size()));
  const Options options = read_options(context);
  const Layouts layouts(context, options);
  auto rails = make_nvshmem_window(context.bootstrap, layouts.rail.end, 0);
  auto node =
      make_node_window(context, map_of(context), layouts.node.end + received_arena_bytes(context));
  return std::make_unique<HierarchicalGpuTransport>(context, layouts, std::move(rails),
                                                    std::move(node));
}

}  // namespace epcomm
