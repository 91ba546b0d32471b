// The nccl transport: making it, and route.
#include "transport/nccl.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "core/checks.h"
#include "core/clock.h"
#include "transport/nccl_transport.h"

namespace epcomm {
namespace {

NcclOptions parse(const std::map<std::string, std::string>& given) {
  NcclOptions o;
  for (const auto& [name, value] : given) {
    auto refuse = [&, n = name, v = value](const char* expected) {
      return InvalidArgument("transport_options['" + n + "'] is '" + v + "'; expected " + expected);
    };
    if (name == "algorithm") {
      const std::map<std::string, NcclAlgorithm> known = {{"auto", NcclAlgorithm::kAuto},
                                                          {"exact", NcclAlgorithm::kExact},
                                                          {"static", NcclAlgorithm::kStatic},
                                                          {"allgather", NcclAlgorithm::kAllGather}};
      if (!known.contains(value)) throw refuse("auto, exact, static or allgather");
      o.algorithm = known.at(value);
    } else if (name == "schedule") {
      if (value != "grouped" && value != "shifted") throw refuse("grouped or shifted");
      o.schedule = value == "grouped" ? Schedule::kGrouped : Schedule::kShifted;
    } else if (name == "chunks") {
      o.chunks = value.size() == 1 ? value[0] - '0' : 0;
      if (o.chunks < 1 || o.chunks > kMaxChunks) throw refuse("1 to 8");
    } else {
      throw refuse("one of the options algorithm, schedule and chunks");
    }
  }
  return o;
}

DeviceMemory to_device(const std::vector<int32_t>& values) {
  DeviceMemory memory(values.size() * sizeof(int32_t));
  EPCOMM_CUDA_TRY(cudaMemcpy(memory.get(), values.data(), values.size() * sizeof(int32_t),
                             cudaMemcpyHostToDevice));
  return memory;
}

}  // namespace

NcclTransport::NcclTransport(const TransportContext& context)
    : config_(context.options.config),
      experts_(context.experts),
      rank_(context.bootstrap.rank()),
      num_ranks_(context.bootstrap.size()),
      options_(parse(context.options.transport_options)),
      dims_{num_ranks_, config_.num_experts, experts_.local_experts(rank_), config_.topk},
      timeout_s_(context.options.timeout_s),
      widest_row_(static_cast<size_t>(config_.hidden) *
                      static_cast<size_t>(dtype_bytes(config_.dtype)) +
                  MetaLayout(config_.topk).record_bytes + kBlockAlignment),
      announce_layout_{num_ranks_, config_.num_experts},
      comm_(context.bootstrap, context.options.timeout_s),
      watchdog_(
          context.bootstrap, context.options.timeout_s, [this] { comm_.abort(); },
          [this] { return comm_.failed(); }),
      expert_rank_(to_device(experts_.ranks())),
      expert_local_(to_device(experts_.locals())),
      counts_(static_cast<size_t>(announce_layout_.words() * num_ranks_) * sizeof(int32_t)),
      bad_index_(3 * sizeof(int32_t)) {
  const size_t ranks = static_cast<size_t>(num_ranks_),
               tokens = static_cast<size_t>(config_.max_tokens);
  const size_t words = static_cast<size_t>(announce_layout_.words());
  tile_count_ = DeviceMemory(static_cast<size_t>(num_tiles(config_.max_tokens)) *
                             (ranks + static_cast<size_t>(config_.num_experts)) * sizeof(int32_t));
  announce_ = DeviceMemory(words * sizeof(int32_t));
  weights_ = DeviceMemory((ranks + 1) * tokens * static_cast<size_t>(config_.topk) * sizeof(float));
  // A reduce-scatter sums in fp32, and its input holds a row for every token of every rank.
  const bool gathers = options_.algorithm == NcclAlgorithm::kAllGather;
  const size_t row =
      gathers ? std::max(widest_row_ + (ranks + 3 * static_cast<size_t>(config_.topk)) * 4,
                         static_cast<size_t>(config_.hidden) * sizeof(float))
              : widest_row_;
  send_ = DeviceMemory((ranks * tokens + 1) * row);
  stage_ = DeviceMemory((ranks * tokens + 1) * row);
  caps_.token_layout = caps_.expert_layout = caps_.padded_layout = true;
  caps_.graph_capture = options_.algorithm != NcclAlgorithm::kExact;
  caps_.cuda = true;
  int device = 0;
  EPCOMM_CUDA_TRY(cudaGetDevice(&device));
  EPCOMM_CUDA_TRY(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device));
}

NcclTransport::~NcclTransport() {
  // What was launched may not have begun yet; the memory below it goes next.
  const Deadline deadline(timeout_s_);
  while (cudaEventQuery(last_call_.get()) == cudaErrorNotReady && !deadline.passed())
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  watchdog_.drain();
}

// Expert ids of an earlier route that nobody waited for: reported before the next one sends
// anything.
void NcclTransport::report_bad_index() {
  auto* words = bad_index_.as<int32_t>();
  const int bad = std::atomic_ref(words[0]).exchange(0);
  EPCOMM_CHECK(bad == 0, bad_expert_id(rank_, bad - 1, words[2], words[1], config_.num_experts));
}

NcclAlgorithm NcclTransport::algorithm(const Plan& plan) const {
  if (options_.algorithm != NcclAlgorithm::kAuto) return options_.algorithm;
  return plan.host_sync ? NcclAlgorithm::kExact : NcclAlgorithm::kStatic;
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
               "static or allgather");
  check_fits("x", args.row_bytes, args.scale_bytes);
  report_bad_index();
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, Operation::kRoute, stream);
  RouteKernelArgs k{};
  k.dims = dims_;
  k.dims.topk = args.topk;
  k.rank = rank_;
  k.max_tokens = config_.max_tokens;
  k.num_tokens = args.num_tokens;
  k.chunks = options_.chunks;
  k.layout = args.layout;
  k.expert_alignment = args.expert_alignment;
  k.index_type = args.index_type;
  const int32_t signature[] = {static_cast<int32_t>(args.layout),
                               args.topk,
                               args.expert_alignment,
                               static_cast<int32_t>(args.dtype),
                               args.row_bytes,
                               args.scale_bytes,
                               args.weighted ? 1 : 0,
                               args.host_sync ? 1 : 0};
  static_assert(sizeof signature == sizeof k.signature);
  std::copy(std::begin(signature), std::end(signature), k.signature);
  k.topk_idx = args.topk_idx;
  k.experts = {expert_rank_.as<int32_t>(), expert_local_.as<int32_t>()};
  k.plan = args.plan;
  k.bad_index = args.host_sync ? nullptr : bad_index_.as<int32_t>();
  k.tile_count = tile_count_.as<int32_t>();
  k.announce = announce_.as<int32_t>();
  k.announced = args.plan.announced;
  launch_count(k, stream);
  const size_t bytes = static_cast<size_t>(announce_layout_.words()) * sizeof(int32_t);
  comm_.all_gather(announce_.get(), args.plan.announced, bytes, stream);
  if (args.host_sync) {
    EPCOMM_CUDA_TRY(cudaMemcpyAsync(counts_.as<char>(), args.plan.announced,
                                    bytes * static_cast<size_t>(num_ranks_), cudaMemcpyDeviceToHost,
                                    stream));
    EPCOMM_CUDA_TRY(cudaEventRecord(counts_ready_.get(), stream));
  }
  launch_assign(k, stream);
  call.end();
  if (!args.host_sync) return {};
  watchdog_.wait(counts_ready_.get());
  return read_counts(args);
}

RouteResult NcclTransport::read_counts(const RouteArgs& args) {
  auto word = [this](int rank, int index) {
    return counts_.as<int32_t>()[rank * announce_layout_.words() + index];
  };
  static constexpr const char* kFields[] = {"layout",       "topk",      "expert_alignment",
                                            "dtype",        "row_bytes", "scale_bytes",
                                            "topk_weights", "host_sync"};
  for (int f = 0; f < AnnounceLayout::kSignatureWords; ++f) {
    std::vector<std::string> values;
    for (int r = 0; r < num_ranks_; ++r)
      values.push_back(std::to_string(word(r, AnnounceLayout::kSignature + f)));
    if (std::any_of(values.begin(), values.end(),
                    [&](const std::string& v) { return v != values[0]; }))
      throw ConfigMismatch(kFields[f], values);
  }
  for (int r = 0; r < num_ranks_; ++r) {
    const int bad = word(r, AnnounceLayout::kBadIndex);
    EPCOMM_CHECK(bad == 0, bad_expert_id(r, bad - 1, args.topk, word(r, AnnounceLayout::kBadValue),
                                         config_.num_experts));
  }
  RouteResult result;
  result.chunk_count.resize(static_cast<size_t>(options_.chunks * num_ranks_ * num_ranks_));
  for (int c = 0; c < options_.chunks; ++c)
    for (int s = 0; s < num_ranks_; ++s)
      for (int d = 0; d < num_ranks_; ++d)
        result.chunk_count[static_cast<size_t>((c * num_ranks_ + s) * num_ranks_ + d)] =
            word(s, announce_layout_.chunk_count(c) + d);
  const PlanCounts counts{result, num_ranks_, options_.chunks};
  result.num_recv_tokens = static_cast<int32_t>(counts.recv_base(num_ranks_, rank_));
  result.tokens_per_expert.assign(static_cast<size_t>(dims_.local_experts), 0);
  for (int e = 0; e < config_.num_experts; ++e)
    if (experts_.rank(e) == rank_)
      for (int s = 0; s < num_ranks_; ++s)
        result.tokens_per_expert[static_cast<size_t>(experts_.local(e))] +=
            word(s, announce_layout_.expert_count() + e);
  int64_t rows = result.num_recv_tokens;
  if (args.layout == Layout::kPadded) {
    rows = int64_t{dims_.local_experts} * num_ranks_ * config_.max_tokens;
  } else if (args.layout == Layout::kExpert) {
    rows = 0;
    for (int32_t n : result.tokens_per_expert)
      rows += static_cast<int64_t>(
          align_up(static_cast<size_t>(n), static_cast<size_t>(args.expert_alignment)));
  }
  result.num_recv_rows = static_cast<int32_t>(rows);
  return result;
}

std::unique_ptr<Transport> make_nccl_transport(const TransportContext& context) {
  EPCOMM_CHECK(context.bootstrap.size() <= kMaxPackRanks,
               "the nccl transport takes at most " + std::to_string(kMaxPackRanks) +
                   " ranks; this group has " + std::to_string(context.bootstrap.size()));
  return std::make_unique<NcclTransport>(context);
}

}  // namespace epcomm
