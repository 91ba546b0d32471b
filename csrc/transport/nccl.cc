// The nccl transport: making it, and route.
#include "transport/nccl.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/checks.h"
#include "kernels/small.h"
#include "transport/gpu_link_transport.h"
#include "transport/nccl_transport.h"
#include "transport/nccl_window.h"

namespace epcomm {
namespace {

// An exchange takes NCCL some 20 us beyond its bytes (docs/nccl.md). Packing a chunk beside the
// exchange of another must hide more than that, and a kernel of its own for a rank's own rows must
// be worth its launch.
constexpr size_t kTwoChunksBytes = size_t{48} << 20;
constexpr size_t kAsideBytes = size_t{8} << 20;

// Throws unless value is a number from 1 to most.
int parse_number(const std::string& value, int most, const InvalidArgument& refusal) {
  const bool number =
      !value.empty() && value.size() <= 3 &&
      std::all_of(value.begin(), value.end(), [](char c) { return c >= '0' && c <= '9'; });
  const int n = number ? std::stoi(value) : 0;
  if (n < 1 || n > most) throw refusal;
  return n;
}

NcclOptions parse(const std::map<std::string, std::string>& given, int num_ranks) {
  NcclOptions o;
  for (const auto& [name, value] : given) {
    auto refuse = [&, n = name, v = value](const char* expected) {
      return InvalidArgument("transport_options['" + n + "'] is '" + v + "'; expected " + expected);
    };
    if (name == "algorithm") {
      const std::map<std::string, NcclAlgorithm> known = {
          {"auto", NcclAlgorithm::kAuto},           {"exact", NcclAlgorithm::kExact},
          {"static", NcclAlgorithm::kStatic},       {"small", NcclAlgorithm::kSmall},
          {"allgather", NcclAlgorithm::kAllGather}, {"window", NcclAlgorithm::kWindow}};
      if (!known.contains(value)) throw refuse("auto, exact, static, small, allgather or window");
      o.algorithm = known.at(value);
    } else if (name == "schedule") {
      const std::map<std::string, Schedule> known = {{"auto", Schedule::kAuto},
                                                     {"grouped", Schedule::kGrouped},
                                                     {"shifted", Schedule::kShifted},
                                                     {"gathered", Schedule::kGathered}};
      if (!known.contains(value)) throw refuse("auto, grouped, shifted or gathered");
      o.schedule = known.at(value);
    } else if (name == "chunks") {
      o.chunks = value == "auto" ? 0 : parse_number(value, kMaxChunks, refuse("auto or 1 to 8"));
    } else if (name == "ctas") {
      o.ctas =
          value == "auto" ? 0 : parse_number(value, NcclComm::kMostCtas, refuse("auto or 1 to 64"));
    } else {
      throw refuse("one of the options algorithm, schedule, chunks and ctas");
    }
  }
  EPCOMM_CHECK(
      o.schedule != Schedule::kGathered || num_ranks == 2,
      "transport_options['schedule'] is 'gathered', which is for 2 ranks; this group has " +
          std::to_string(num_ranks) + ": expected auto, grouped or shifted");
  return o;
}

// Throws InvalidArgument if the algorithm was asked for by its name and cannot be.
bool takes(NcclAlgorithm algorithm, const char* name, const NcclOptions& options,
           const std::string& why_not) {
  EPCOMM_CHECK(why_not.empty() || options.algorithm != algorithm,
               std::string("transport_options['algorithm'] is '") + name + "', but " + why_not);
  return why_not.empty() &&
         (options.algorithm == algorithm || options.algorithm == NcclAlgorithm::kAuto);
}

}  // namespace

NcclTransport::NcclTransport(const TransportContext& context, const NcclOptions& options,
                             std::string choice)
    : config_(context.options.config),
      experts_(context.experts),
      rank_(context.bootstrap.rank()),
      num_ranks_(context.bootstrap.size()),
      options_(options),
      choice_(std::move(choice)),
      dims_{num_ranks_, config_.num_experts, experts_.local_experts(rank_), config_.topk},
      timeout_s_(context.options.timeout_s),
      widest_row_(static_cast<size_t>(config_.hidden) *
                      static_cast<size_t>(dtype_bytes(config_.dtype)) +
                  MetaLayout(config_.topk).record_bytes + kBlockAlignment),
      chunks_(options_.chunks),
      small_(takes(NcclAlgorithm::kSmall, "small", options_, why_not_small(context))),
      route_(config_, experts_, rank_, num_ranks_),
      comm_(context.bootstrap, context.options, options_.ctas),
      watchdog_(
          context.bootstrap, context.options.timeout_s, [this] { comm_.abort(); },
          [this] { return comm_.failed(); }) {
  const size_t ranks = static_cast<size_t>(num_ranks_),
               tokens = static_cast<size_t>(config_.max_tokens);
  weights_ = DeviceMemory((ranks + 1) * tokens * static_cast<size_t>(config_.topk) * sizeof(float));
  // A reduce-scatter sums in fp32, and its input holds a row for every token of every rank.
  const bool gathers = options_.algorithm == NcclAlgorithm::kAllGather;
  const size_t row =
      gathers ? std::max(widest_row_ + (ranks + 3 * static_cast<size_t>(config_.topk)) * 4,
                         static_cast<size_t>(config_.hidden) * sizeof(float))
              : widest_row_;
  send_ = DeviceMemory((ranks * tokens + 1) * row);
  stage_ = DeviceMemory((ranks * tokens + 1) * row);
  if (small_)
    gathered_ = DeviceMemory(
        SmallLayout::gathered(dims_, config_.max_tokens, align_up(widest_row_, 16)).end);
  // From what all ranks know alike.
  const size_t batch_bytes = tokens * static_cast<size_t>(config_.hidden) *
                             static_cast<size_t>(dtype_bytes(config_.dtype));
  if (chunks_ == 0) chunks_ = (ranks - 1) * batch_bytes >= kTwoChunksBytes ? 2 : 1;
  if (num_ranks_ == 1) chunks_ = 1;
  aside_ = num_ranks_ > 1 && (chunks_ > 1 || batch_bytes >= kAsideBytes);
  caps_.token_layout = caps_.expert_layout = caps_.padded_layout = true;
  caps_.graph_capture = options_.algorithm != NcclAlgorithm::kExact;
  caps_.cuda = true;
  caps_.received_tokens = true;
  int device = 0;
  EPCOMM_CUDA_TRY(cudaGetDevice(&device));
  EPCOMM_CUDA_TRY(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device));
}

NcclTransport::~NcclTransport() {
  // What was launched may not have begun yet; the memory below it goes next.
  order_.drain(timeout_s_);
  watchdog_.drain();
}

NcclAlgorithm NcclTransport::algorithm(const Plan& plan) const {
  if (options_.algorithm != NcclAlgorithm::kAuto) return options_.algorithm;
  if (plan.host_sync) return NcclAlgorithm::kExact;
  return small_ ? NcclAlgorithm::kSmall : NcclAlgorithm::kStatic;
}

void NcclTransport::check_fits(const char* what, int64_t row_bytes, int64_t scale_bytes) const {
  const int64_t widest = int64_t{config_.hidden} * dtype_bytes(config_.dtype);
  EPCOMM_CHECK(row_bytes + scale_bytes <= widest,
               std::string(what) + " has " + std::to_string(row_bytes + scale_bytes) +
                   " bytes per row with its scales; expected at most the " +
                   std::to_string(widest) + " bytes of a row of the Buffer's dtype");
}

RouteResult NcclTransport::route(const RouteArgs& args) {
  EPCOMM_CHECK(args.host_sync || options_.algorithm != NcclAlgorithm::kExact,
               "host_sync is False with transport_options['algorithm'] 'exact'; expected auto, "
               "static, small or allgather");
  check_fits("x", args.row_bytes, args.scale_bytes);
  route_.report_bad_index();
  if (small_ && !args.host_sync) {
    watchdog_.check();
    return route_small(args);
  }
  const auto stream = static_cast<cudaStream_t>(args.stream);
  make_call(Operation::kRoute, stream, [&](const Call& call) {
    RouteKernelArgs k = route_.args(args, chunks_);
    k.mark = call.begin_mark();
    launch_count(k, stream);
    comm_.all_gather(route_.announce(), args.plan.announced, route_.announce_bytes(), stream);
    if (args.host_sync) route_.fetch(args.plan.announced, stream);
    k.mark = call.end_mark();
    launch_assign(k, stream);
  });
  if (!args.host_sync) return {};
  watchdog_.wait(route_.fetched());
  return route_.result(args, chunks_);
}

std::unique_ptr<Transport> make_nccl_transport(const TransportContext& context) {
  EPCOMM_CHECK(context.bootstrap.size() <= kMaxPackRanks,
               "the nccl transport takes at most " + std::to_string(kMaxPackRanks) +
                   " ranks; this group has " + std::to_string(context.bootstrap.size()));
  const NcclOptions options = parse(context.options.transport_options, context.bootstrap.size());
  const bool decides = options.algorithm == NcclAlgorithm::kAuto;
  std::string why_not;
  if (decides || options.algorithm == NcclAlgorithm::kWindow) {
    why_not = why_no_window(context);
    if (takes(NcclAlgorithm::kWindow, "window", options, why_not))
      return make_nccl_window_transport(
          context, decides ? "algorithm window, because every GPU of the group can address every "
                             "other; NCCL is not used"
                           : "");
  }
  return std::make_unique<NcclTransport>(
      context, options, decides ? "rows go through NCCL, not window, because " + why_not : "");
}

}  // namespace epcomm
