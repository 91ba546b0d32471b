// Calls through a link: their state, and route.
#include "transport/gpu_link_transport.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/checks.h"
#include "core/recv_rows.h"
#include "transport/gpu_window.h"

namespace epcomm {
namespace {

// The host would wait for what only a launch of the graph can tell it.
void check_not_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  EPCOMM_CUDA_TRY(cudaStreamIsCapturing(stream, &status));
  EPCOMM_CHECK(status == cudaStreamCaptureStatusNone,
               "host_sync is set and the stream is being captured into a graph; dispatch with "
               "host_sync=False there");
}

}  // namespace

Dims gpu_dims(const TransportContext& context) {
  const int rank = context.bootstrap.rank();
  return {context.bootstrap.size(), context.options.config.num_experts,
          context.experts.local_experts(rank), context.options.config.topk, true};
}

size_t widest_row(const Config& config) {
  return static_cast<size_t>(config.hidden) * static_cast<size_t>(dtype_bytes(config.dtype));
}

// Unlike memory of the host, memory of a GPU is taken when it is mapped: four full dispatches of
// layout kToken, and two of kPadded where that is not out of all proportion.
size_t received_arena_bytes(const TransportContext& context) {
  if (context.options.window_bytes != 0) return context.options.window_bytes;
  constexpr size_t kMostForPadded = size_t{2} << 30;
  const Config& config = context.options.config;
  const size_t row = widest_row(config) + MetaLayout(config.topk).record_bytes + kBlockAlignment;
  const size_t tokens =
      static_cast<size_t>(context.bootstrap.size()) * static_cast<size_t>(config.max_tokens);
  const size_t padded = tokens * row * static_cast<size_t>(context.experts.max_local_experts());
  return 4 * tokens * row + 2 * std::min(padded, kMostForPadded) + (size_t{64} << 20);
}

SmallLayout small_layout(const TransportContext& context, size_t begin, bool puts) {
  const Config& config = context.options.config;
  // Floats per slot (CombineArgs::by_token) can be wider than very short rows.
  const size_t slots = align_up(static_cast<size_t>(config.topk), 4) * sizeof(float);
  return {gpu_dims(context), config.max_tokens, std::max(widest_row(config), slots), begin, puts};
}

LinkWindows peer_windows(const std::shared_ptr<GpuWindow>& window, int num_ranks) {
  LinkWindows windows;
  for (int r = 0; r < num_ranks; ++r) windows.window[r] = window->peer(r);
  windows.owner = window;
  return windows;
}

void describe_plan(LinkEntry& entry, const Plan& plan) {
  entry_field(entry, CallField::kLayout) = static_cast<int32_t>(plan.layout);
  entry_field(entry, CallField::kTopk) = plan.topk;
  entry_field(entry, CallField::kAlignment) = plan.expert_alignment;
  entry_field(entry, CallField::kHostSync) = plan.host_sync ? 1 : 0;
  entry_field(entry, CallField::kPlan) = static_cast<int32_t>(plan.result.epoch);
}

void describe_rows(LinkEntry& entry, const Plan& plan, const DispatchArgs& args) {
  describe_plan(entry, plan);
  entry_field(entry, CallField::kDtype) = static_cast<int32_t>(args.dtype);
  entry_field(entry, CallField::kRowBytes) = args.row_bytes;
  entry_field(entry, CallField::kScaleBytes) = args.scale_bytes;
  entry_field(entry, CallField::kWeighted) = args.topk_weights != nullptr ? 1 : 0;
  entry.needed_bytes = args.needed_bytes;
  entry.free_bytes = args.free_bytes;
}

void describe_dispatch(LinkEntry& entry, const Plan& plan, const DispatchArgs& args,
                       const WindowArena& arena) {
  describe_rows(entry, plan, args);
  if (!makes_room(args)) return;
  entry.rows = arena.offset(args.recv_x);
  entry.scales = arena.offset(args.recv_scales);
  entry.meta = arena.offset(plan.view.recv_meta);
  if (plan.layout != Layout::kToken) return;
  entry.index_bytes = static_cast<int32_t>(args.index_type);
  if (arena.contains(args.recv_topk_idx, 1)) entry.topk_idx = arena.offset(args.recv_topk_idx);
  if (arena.contains(args.recv_topk_weights, 1))
    entry.topk_weights = arena.offset(args.recv_topk_weights);
}

GpuLinkTransport::GpuLinkTransport(const TransportContext& context, const LinkKernels& kernels,
                                   LinkWindows windows, const ControlLayout& control,
                                   const SmallLayout& small, bool takes_small)
    : takes_small_(takes_small),
      kernels_(kernels),
      config_(context.options.config),
      experts_(context.experts),
      rank_(context.bootstrap.rank()),
      num_ranks_(context.bootstrap.size()),
      timeout_s_(context.options.timeout_s),
      route_(config_, experts_, rank_, num_ranks_),
      control_(control),
      small_(small),
      windows_(std::move(windows)),
      state_(sizeof(LinkState)),
      report_(sizeof(LinkReport)),
      watchdog_(
          context.bootstrap, timeout_s_,
          [this] {
            std::atomic_ref(report_.as<LinkReport>()->abort).store(1, std::memory_order_release);
          },
          [] { return false; }) {
  caps_.token_layout = caps_.expert_layout = caps_.padded_layout = true;
  caps_.two_phases = caps_.small_batches = takes_small_;
  caps_.graph_capture = caps_.column_scales = caps_.sends_ahead = true;
  caps_.received_tokens = caps_.wait_times = true;
  caps_.cuda = true;
  if (takes_small_) {
    caps_.fused_quants = kAllQuants;
    caps_.combine_quants = Caps::bit(Quant::kFp8);
  }
}

void GpuLinkTransport::drain() {
  order_.drain(timeout_s_);
  drain_blocks();
  watchdog_.drain();
}

// Of a replay of a graph no event tells that it is over, nor does a kernel that ends silently:
// until all of its blocks that have begun have left.
void GpuLinkTransport::drain_blocks() const {
  // Nothing here harms a capture of another thread.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  try {
    const Stream stream;
    const PinnedMemory copy(sizeof(LinkState));
    const auto& state = *copy.as<LinkState>();
    const Deadline deadline(timeout_s_);
    // A copy may meet a block that writes: twice.
    for (int over = 0; over < 2 && !deadline.passed();) {
      EPCOMM_CUDA_TRY(cudaMemcpyAsync(copy.as<LinkState>(), state_.as<LinkState>(),
                                      sizeof(LinkState), cudaMemcpyDeviceToHost, stream.get()));
      while (cudaStreamQuery(stream.get()) == cudaErrorNotReady && !deadline.passed())
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      over = state.arrived == 0 && state.left == state.blocks ? over + 1 : 0;
    }
  } catch (const Error&) {
    // The device is in error: nothing runs any more.
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
}

Dims GpuLinkTransport::dims(int topk) const {
  return {num_ranks_, config_.num_experts, experts_.local_experts(rank_), topk, true};
}

int32_t GpuLinkTransport::most_rows(const Plan& plan) const {
  return static_cast<int32_t>(most_recv_rows(plan.layout, int64_t{num_ranks_} * config_.max_tokens,
                                             plan.topk, experts_.local_experts(rank_),
                                             plan.expert_alignment));
}

LinkArgs GpuLinkTransport::link(Operation operation) const {
  LinkArgs link{};
  link.rank = rank_;
  link.num_ranks = num_ranks_;
  for (int r = 0; r < num_ranks_; ++r) {
    link.window[r] = windows_.window[r];
    link.pe[r] = windows_.pe[r];
  }
  link.control = control_;
  link.state = state_.as<LinkState>();
  link.report = report_.as<LinkReport>();
  link.progress = watchdog_.progress();
  // The watchdog ends a wait in time, and knows whom to blame; this is for when it cannot.
  link.timeout_ns = static_cast<uint64_t>(2e9 * timeout_s_);
  link.statistics = statistics_;
  link.entry.signature[static_cast<int>(CallField::kOperation)] = static_cast<int32_t>(operation);
  link.entry.cut_for = windows_.cut_for;
  return link;
}

void GpuLinkTransport::check() {
  watchdog_.check();
  raise_all_refusals();
}

// Calls that are not ahead of their counts have room, unless ranks take different ways.
void GpuLinkTransport::raise_all_refusals() {
  if (raise_refusal())
    throw Error(
        "a dispatch moved nothing, because another rank had made too little room for it; call "
        "dispatch with the same layout, topk and expert_alignment on all ranks");
}

// What the kernels of an earlier call found when they compared the ranks' entries. True: it was
// refused for want of room that is to be made by dispatching again.
bool GpuLinkTransport::raise_refusal(bool settles) {
  // Another thread may wait for an event of an earlier call meanwhile.
  std::lock_guard lock(refusals_);
  if (settling_ && !settles) return false;
  auto& report = *report_.as<LinkReport>();
  if (std::atomic_ref(report.refused).load(std::memory_order_acquire) == 0) return false;
  const std::vector<LinkEntry> entries(report.entry, report.entry + num_ranks_);
  std::atomic_ref(report.refused).store(0, std::memory_order_release);
  for (int f = 0; f < kCallFields; ++f) {
    std::vector<int32_t> values;
    for (const LinkEntry& entry : entries) values.push_back(entry.signature[f]);
    check_call_field(static_cast<CallField>(f), values);
  }
  for (int r = 0; r < num_ranks_; ++r) {
    const LinkEntry& entry = entries[static_cast<size_t>(r)];
    if (entry.needed_bytes != 0) throw WindowFull(r, entry.needed_bytes, entry.free_bytes);
    const int topk = entry.signature[static_cast<int>(CallField::kTopk)];
    EPCOMM_CHECK(entry.bad_index == 0,
                 bad_expert_id(r, entry.bad_index - 1, topk, entry.bad_value, config_.num_experts));
  }
  return true;
}

// Until the call under way has written something to the host.
template <class Reached>
void GpuLinkTransport::await(Reached reached) {
  for (int spin = 1; !reached(); ++spin) {
    if (spin % 256 != 0) continue;
    watchdog_.check();
    if (spin > 20'000) std::this_thread::yield();
  }
  watchdog_.check();
}

// Until all ranks have entered the call: it is refused on all of them, or on none. What they refuse
// is not looked at before: of a call ahead of its counts, routing and rows may both be refused.
void GpuLinkTransport::await_entered(uint64_t token) {
  auto& report = *report_.as<LinkReport>();
  await([&] { return std::atomic_ref(report.entered).load(std::memory_order_acquire) == token; });
}

void GpuLinkTransport::wait_entered(uint64_t token) {
  await_entered(token);
  raise_all_refusals();
}

RouteResult GpuLinkTransport::route(const RouteArgs& args) {
  expect_settle(false);  // of a call that failed half-way
  check();
  route_.report_bad_index();
  if (args.host_sync) check_not_capturing(static_cast<cudaStream_t>(args.stream));
  if (takes_small_) {
    check_phase(Phase::kAll, Operation::kRoute);
    check_fits_slot(args.row_bytes, args.scale_bytes);
    // A host that waits for the counts before the rows are sent waits between two kernels.
    if (!args.host_sync || args.ahead) return route_small(args);
  }
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, stream);
  const RouteKernelArgs k = route_.args(args, 1);
  LinkArgs link = this->link(Operation::kRoute);
  const CallField announced[] = {CallField::kLayout,   CallField::kTopk,     CallField::kAlignment,
                                 CallField::kDtype,    CallField::kRowBytes, CallField::kScaleBytes,
                                 CallField::kWeighted, CallField::kHostSync};
  for (int f = 0; f < AnnounceLayout::kSignatureWords; ++f)
    link.entry.signature[static_cast<int>(announced[f])] = k.signature[f];
  expect_settle(args.ahead);
  launch_count(k, stream);
  kernels_.exchange(link, route_.announce(), args.plan.announced, route_.layout().words(), stream);
  if (args.host_sync) route_.fetch(args.plan.announced, stream);
  launch_assign(k, stream);
  route_more(args);
  call.end();
  const uint64_t number = ++routes_;  // also where this throws: it does so on all ranks
  RouteResult result;
  if (args.ahead) {
    unsettled_ = args;
    result.unsettled = true;
  } else if (args.host_sync) {
    watchdog_.wait(route_.fetched());
    raise_all_refusals();
    result = route_.result(args, 1);
  }
  result.epoch = number;
  return result;
}

bool GpuLinkTransport::settle(Plan& plan) {
  if (!takes_small_) watchdog_.wait(route_.fetched());
  await_entered(tokens_);
  bool refused = false;
  try {
    refused = raise_refusal(true);
  } catch (...) {
    expect_settle(false);
    throw;
  }
  expect_settle(false);
  const uint64_t epoch = plan.result.epoch;
  if (takes_small_ && !refused) await([&] { return route_.has_totals(tokens_); });
  plan.result = takes_small_ ? route_.totals_result(unsettled_) : route_.result(unsettled_, 1);
  plan.result.epoch = epoch;
  return !refused;
}

void GpuLinkTransport::check_capacity(const Plan& plan, const DispatchArgs& args) const {
  if (!plan.host_sync || plan.result.unsettled) return;
  const bool by_token = plan.layout == Layout::kToken;
  const int32_t tokens = plan.result.num_recv_tokens;
  const int32_t rows = by_token ? tokens : plan.result.num_recv_rows;
  EPCOMM_CHECK(args.recv_capacity >= tokens && args.row_capacity >= rows,
               "recv_capacity and row_capacity are " + std::to_string(args.recv_capacity) +
                   " and " + std::to_string(args.row_capacity) + "; this plan receives " +
                   std::to_string(tokens) + " tokens in " + std::to_string(rows) + " rows");
}

// Peers write to these addresses: a wrong one must be refused here, not met there.
void GpuLinkTransport::check_outputs(const Plan& plan, const DispatchArgs& args,
                                     const WindowArena& arena) const {
  if (args.needed_bytes != 0) return;
  check_capacity(plan, args);
  if (plan.result.unsettled && args.recv_capacity < 0) return;
  auto inside = [&arena](const void* p, int64_t bytes) {
    return bytes == 0 || arena.contains(p, static_cast<size_t>(bytes));
  };
  const auto record_bytes = static_cast<int64_t>(MetaLayout(plan.topk).record_bytes);
  EPCOMM_CHECK(inside(args.recv_x, int64_t{args.row_capacity} * args.row_bytes) &&
                   inside(args.recv_scales, int64_t{args.row_capacity} * args.scale_bytes) &&
                   inside(plan.view.recv_meta, args.recv_capacity * record_bytes),
               "recv_x, recv_scales and recv_meta must lie in memory from Buffer::allocate and "
               "hold what the plan receives");
}

GuessedRoom GpuLinkTransport::guessed_room(const Plan& plan, const DispatchArgs& args) const {
  if (!plan.result.unsettled) return {};
  const bool grouped = plan.layout == Layout::kExpert;
  const int32_t* rows_end = plan.view.expert_offset + experts_.local_experts(rank_);
  return {plan.view.num_recv, grouped ? rows_end : nullptr, args.recv_capacity, args.row_capacity};
}

}  // namespace epcomm
