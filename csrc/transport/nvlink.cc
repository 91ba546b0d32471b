// The nvlink transport: making it, and route.
#include "transport/nvlink.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "core/call_fields.h"
#include "core/checks.h"
#include "transport/nvlink_transport.h"

namespace epcomm {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kMostForPadded = size_t{2} << 30;

size_t widest_row(const Config& config) {
  return static_cast<size_t>(config.hidden) * static_cast<size_t>(dtype_bytes(config.dtype));
}

// Floats per slot (CombineArgs::by_token) can be wider than very short rows.
size_t slots_row(const Config& config) {
  return align_up(static_cast<size_t>(config.topk), 4) * sizeof(float);
}

// Unlike memory of the host, memory of a GPU is taken when it is mapped: four full dispatches of
// layout kToken, and two of kPadded where that is not out of all proportion.
size_t arena_bytes(const TransportContext& context) {
  if (context.options.window_bytes != 0) return context.options.window_bytes;
  const Config& config = context.options.config;
  const size_t row = widest_row(config) + MetaLayout(config.topk).record_bytes + kBlockAlignment;
  const size_t tokens =
      static_cast<size_t>(context.bootstrap.size()) * static_cast<size_t>(config.max_tokens);
  const size_t padded = tokens * row * static_cast<size_t>(context.experts.max_local_experts());
  return 4 * tokens * row + 2 * std::min(padded, kMostForPadded) + (size_t{64} << 20);
}

}  // namespace

Dims nvlink_dims(const TransportContext& context) {
  const int rank = context.bootstrap.rank();
  return {context.bootstrap.size(), context.options.config.num_experts,
          context.experts.local_experts(rank), context.options.config.topk, true};
}

NvlinkLayout::NvlinkLayout(const TransportContext& context, const ControlLayout& control,
                           bool takes_small)
    : small(nvlink_dims(context), context.options.config.max_tokens,
            std::max(widest_row(context.options.config), slots_row(context.options.config)),
            control.arena) {
  if (takes_small) {
    weights = staging = arena = bytes = align_up(small.end, kPage);
    return;
  }
  const Config& config = context.options.config;
  const size_t ranks = static_cast<size_t>(context.bootstrap.size()),
               tokens = static_cast<size_t>(config.max_tokens);
  weights = control.arena;
  staging = align_up(weights + tokens * static_cast<size_t>(config.topk) * sizeof(float), kPage);
  arena = align_up(staging + ranks * tokens * small.row_bytes, kPage);
  bytes = arena + arena_bytes(context);
}

NvlinkTransport::NvlinkTransport(const TransportContext& context, bool takes_small)
    : takes_small_(takes_small),
      config_(context.options.config),
      experts_(context.experts),
      rank_(context.bootstrap.rank()),
      num_ranks_(context.bootstrap.size()),
      timeout_s_(context.options.timeout_s),
      route_(config_, experts_, rank_, num_ranks_),
      control_(nvlink_dims(context)),
      layout_(context, control_, takes_small),
      window_(make_gpu_window(context.bootstrap, layout_.bytes, timeout_s_)),
      arena_(*window_, layout_.arena),
      state_(sizeof(LinkState)),
      report_(sizeof(LinkReport)),
      watchdog_(
          context.bootstrap, timeout_s_,
          [this] {
            std::atomic_ref(report_.as<LinkReport>()->abort).store(1, std::memory_order_release);
          },
          [] { return false; }) {
  caps_.token_layout = caps_.expert_layout = caps_.padded_layout = true;
  caps_.symmetric_outputs = !takes_small_;
  caps_.two_phases = caps_.small_batches = takes_small_;
  caps_.graph_capture = true;
  caps_.cuda = true;
  if (!takes_small_ && can_quantise_on_the_way())
    caps_.fused_quants =
        Caps::bit(Quant::kFp8) | Caps::bit(Quant::kFp8Ue8m0) | Caps::bit(Quant::kNvfp4);
}

NvlinkTransport::~NvlinkTransport() {
  // What was launched may not have begun yet; the memory below it goes next.
  order_.drain(timeout_s_);
  watchdog_.drain();
}

Dims NvlinkTransport::dims(int topk) const {
  return {num_ranks_, config_.num_experts, experts_.local_experts(rank_), topk, true};
}

LinkArgs NvlinkTransport::link(Operation operation) const {
  LinkArgs link{};
  link.rank = rank_;
  link.num_ranks = num_ranks_;
  for (int r = 0; r < num_ranks_; ++r) link.window[r] = window_->peer(r);
  link.control = control_;
  link.state = state_.as<LinkState>();
  link.report = report_.as<LinkReport>();
  link.progress = watchdog_.progress();
  // The watchdog ends a wait in time, and knows whom to blame; this is for when it cannot.
  link.timeout_ns = static_cast<uint64_t>(2e9 * timeout_s_);
  link.entry.signature[static_cast<int>(CallField::kOperation)] = static_cast<int32_t>(operation);
  return link;
}

uint64_t NvlinkTransport::offset_of(const void* p) const {
  return p == nullptr ? 0
                      : static_cast<uint64_t>(static_cast<const char*>(p) - window_->peer(rank_));
}

void NvlinkTransport::check() {
  watchdog_.check();
  raise_refusal();
}

// What the kernels of an earlier call found when they compared the ranks' entries.
void NvlinkTransport::raise_refusal() {
  auto& report = *report_.as<LinkReport>();
  if (std::atomic_ref(report.refused).load(std::memory_order_acquire) == 0) return;
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
  }
}

// Until all ranks have entered the call: it is refused on all of them, or on none.
void NvlinkTransport::wait_entered(uint64_t token) {
  auto& report = *report_.as<LinkReport>();
  for (int spin = 1; std::atomic_ref(report.entered).load(std::memory_order_acquire) != token;
       ++spin) {
    if (spin % 256 != 0) continue;
    check();
    if (spin > 20'000) std::this_thread::yield();
  }
  check();
}

RouteResult NvlinkTransport::route(const RouteArgs& args) {
  check();
  route_.report_bad_index();
  if (takes_small_) {
    check_phase(Phase::kAll, Operation::kRoute);
    check_fits_slot(args.row_bytes, args.scale_bytes);
    // Where the host waits for the counts it waits before the rows are sent: two kernels at least.
    if (!args.host_sync) return route_small(args);
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
  launch_count(k, stream);
  launch_exchange(link, route_.announce(), args.plan.announced, route_.layout().words(), stream);
  if (args.host_sync) route_.fetch(args.plan.announced, stream);
  launch_assign(k, stream);
  call.end();
  const uint64_t number = ++routes_;  // also where this throws: it does so on all ranks
  RouteResult result;
  if (args.host_sync) {
    watchdog_.wait(route_.fetched());
    raise_refusal();
    result = route_.result(args, 1);
  }
  result.epoch = number;
  return result;
}

std::unique_ptr<Transport> make_nvlink_transport(const TransportContext& context) {
  EPCOMM_CHECK(context.bootstrap.size() <= kMaxLinkRanks,
               "the nvlink transport takes at most " + std::to_string(kMaxLinkRanks) +
                   " ranks; this group has " + std::to_string(context.bootstrap.size()));
  return std::make_unique<NvlinkTransport>(context, takes_small_path(context));
}

}  // namespace epcomm
