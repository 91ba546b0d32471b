// Moves rows with NCCL, which finds a way between any two GPUs. A token crosses once per
// destination rank.
//
// route: counts on the device, one all-gather of the counts, slots on the device.
// Rows go one of three ways (transport_options "algorithm"):
//   exact      the host knows all counts (host_sync=True): rows are packed by destination and sent
//   with
//              ncclSend/ncclRecv in as many bytes as there are, in pieces, so that packing one
//              piece overlaps sending the one before. In layout "token" rows are received in their
//              final place.
//   static     the host knows nothing: every pair exchanges max_tokens rows. Can be captured into a
//   graph. allgather  every rank gets every row and keeps its own; the way back is a reduce-scatter
//   in fp32, whose
//              order of summation is NCCL's (results may differ in the last bit from the other
//              ways). Can be captured. Moves as many bytes as static, and suits NCCL better.
//   auto       exact where the host knows the counts; else static. The measured reasons are in
//   docs/nccl.md.
//
// Memory, made with the Buffer: send_ and stage_ hold max_tokens rows per rank each (twice that in
// fp32 for reduce-scatter), announce_ what this rank tells the others when it routes.
#include "transport/nccl.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "core/clock.h"
#include "core/expert_map.h"
#include "kernels/kernels.h"
#include "transport/gpu_memory.h"
#include "transport/gpu_watchdog.h"
#include "transport/nccl_comm.h"

namespace epcomm {
namespace {

enum class Algorithm { kAuto, kExact, kStatic, kAllGather };

struct Options {
  Algorithm algorithm = Algorithm::kAuto;
  Schedule schedule = Schedule::kGrouped;
  int chunks = 2;
};

Options parse(const std::map<std::string, std::string>& given) {
  Options o;
  for (const auto& [name, value] : given) {
    auto refuse = [&, n = name, v = value](const char* expected) {
      return InvalidArgument("transport_options['" + n + "'] is '" + v + "'; expected " + expected);
    };
    if (name == "algorithm") {
      const std::map<std::string, Algorithm> known = {{"auto", Algorithm::kAuto},
                                                      {"exact", Algorithm::kExact},
                                                      {"static", Algorithm::kStatic},
                                                      {"allgather", Algorithm::kAllGather}};
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

// Host-side counts of a plan made with host_sync.
struct Counts {
  const RouteResult& result;
  int num_ranks, chunks;
  int64_t chunk(int c, int source, int destination) const {
    return result
        .chunk_count[static_cast<size_t>((c * num_ranks + source) * num_ranks + destination)];
  }
  int64_t total(int source, int destination) const { return before(chunks, source, destination); }
  // Tokens of the chunks before c.
  int64_t before(int c, int source, int destination) const {
    int64_t n = 0;
    for (int i = 0; i < c; ++i) n += chunk(i, source, destination);
    return n;
  }
  // Index of source's first token at destination.
  int64_t recv_base(int source, int destination) const {
    int64_t n = 0;
    for (int s = 0; s < source; ++s) n += total(s, destination);
    return n;
  }
  // Index of destination's first token among those that source sends.
  int64_t send_base(int source, int destination) const {
    int64_t n = 0;
    for (int d = 0; d < destination; ++d) n += total(source, d);
    return n;
  }
};

class NcclTransport final : public Transport {
 public:
  explicit NcclTransport(const TransportContext& context);
  ~NcclTransport() override;

  const Caps& caps() const override { return caps_; }
  RouteResult route(const RouteArgs& args) override;
  void dispatch(const Plan& plan, const DispatchArgs& args) override;
  void combine(const Plan& plan, const CombineArgs& args) override;
  void check() override { watchdog_.check(); }
  Allocation allocate(size_t) override { return {}; }
  size_t free_bytes() const override { return 0; }

 private:
  // One call on the stream, from its construction to end(). Calls share the staging memory, so one
  // on another stream than the last starts after it. A call that throws in between is half-way: it
  // tells the peers, and nothing more can be sent.
  class Call {
   public:
    Call(NcclTransport& transport, Operation operation, cudaStream_t stream)
        : transport_(transport), operation_(operation), stream_(stream) {
      EPCOMM_CUDA_TRY(cudaStreamIsCapturing(stream, &capturing_));
      transport_.watchdog_.check();
      // Inside a capture the order between calls is the graph's, and outside events do not count.
      if (capturing_ == cudaStreamCaptureStatusNone && transport_.last_stream_ != stream)
        EPCOMM_CUDA_TRY(cudaStreamWaitEvent(stream, transport_.last_call_.get(), 0));
      transport_.watchdog_.begin(operation, stream);
    }
    ~Call() {
      if (!ended_) transport_.watchdog_.abandon("it failed half-way through a call");
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    void end() {
      transport_.watchdog_.end(operation_, stream_);
      if (capturing_ == cudaStreamCaptureStatusNone) {
        EPCOMM_CUDA_TRY(cudaEventRecord(transport_.last_call_.get(), stream_));
        transport_.last_stream_ = stream_;
      }
      ended_ = true;
    }

   private:
    NcclTransport& transport_;
    Operation operation_;
    cudaStream_t stream_;
    cudaStreamCaptureStatus capturing_ = cudaStreamCaptureStatusNone;
    bool ended_ = false;
  };

  // Where the rows of one region (payload, scales, records) of a send or receive buffer start.
  struct Region {
    char *x, *scales, *meta;
  };
  static Region region(char* base, int64_t rows, const RowSpec& spec);
  size_t region_bytes(int64_t rows, const RowSpec& spec, size_t record_bytes) const;

  Algorithm algorithm(const Plan& plan) const;
  // SMs for a kernel that runs while NCCL's kernel does and must leave it room.
  int beside(int num_sms) const { return num_sms == 0 ? num_sms_ * 3 / 8 : num_sms; }
  void check_fits(const char* what, int64_t row_bytes, int64_t scale_bytes) const;
  void report_bad_index();
  InvalidArgument bad_index(int rank, int position, int topk, int value) const;
  RouteResult read_counts(const RouteArgs& args);
  PlaceArgs place_args(const Plan& plan, const DispatchArgs& args) const;
  PackArgs pack_args(const Plan& plan, const DispatchArgs& args) const;
  void dispatch_exact(const Plan& plan, const DispatchArgs& args, cudaStream_t stream);
  void dispatch_static(const Plan& plan, const DispatchArgs& args, cudaStream_t stream);
  void dispatch_gathered(const Plan& plan, const DispatchArgs& args, cudaStream_t stream);
  PartialArgs partial_args(const Plan& plan, const CombineArgs& args, cudaStream_t stream);
  SumArgs sum_args(const Plan& plan, const CombineArgs& args) const;
  void combine_exact(const Plan& plan, const CombineArgs& args, cudaStream_t stream);
  void combine_static(const Plan& plan, const CombineArgs& args, cudaStream_t stream);
  void combine_gathered(const Plan& plan, const CombineArgs& args, cudaStream_t stream);

  Config config_;
  const ExpertMap& experts_;
  int rank_, num_ranks_;
  Options options_;
  Dims dims_;
  Caps caps_;
  double timeout_s_;
  int num_sms_ = 0;
  size_t widest_row_;  // bytes of a row with its scales and record
  AnnounceLayout announce_layout_;
  NcclComm comm_;
  GpuWatchdog watchdog_;
  DeviceMemory expert_rank_, expert_local_, tile_count_, announce_, send_, stage_, weights_;
  PinnedMemory counts_;
  PinnedMemory bad_index_;              // see RouteKernelArgs; for calls without host_sync
  cudaStream_t last_stream_ = nullptr;  // that last_call_ was recorded on
  Stream side_;  // packs ahead of, or sums behind, the exchanges on the caller's stream
  Event last_call_, fork_, join_, chunk_done_[kMaxChunks], counts_ready_;
};

DeviceMemory to_device(const std::vector<int32_t>& values) {
  DeviceMemory memory(values.size() * sizeof(int32_t));
  EPCOMM_CUDA_TRY(cudaMemcpy(memory.get(), values.data(), values.size() * sizeof(int32_t),
                             cudaMemcpyHostToDevice));
  return memory;
}

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
  const bool gathers = options_.algorithm == Algorithm::kAllGather;
  const size_t row =
      gathers ? std::max(widest_row_ + (ranks + 3 * static_cast<size_t>(config_.topk)) * 4,
                         static_cast<size_t>(config_.hidden) * sizeof(float))
              : widest_row_;
  send_ = DeviceMemory((ranks * tokens + 1) * row);
  stage_ = DeviceMemory((ranks * tokens + 1) * row);
  caps_.token_layout = caps_.expert_layout = caps_.padded_layout = true;
  caps_.graph_capture = options_.algorithm != Algorithm::kExact;
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
  if (bad != 0) throw bad_index(rank_, bad - 1, words[2], words[1]);
}

// position: t * topk + k.
InvalidArgument NcclTransport::bad_index(int rank, int position, int topk, int value) const {
  return InvalidArgument(
      "topk_idx on rank " + std::to_string(rank) + " (token " + std::to_string(position / topk) +
      ", slot " + std::to_string(position % topk) + ") is " + std::to_string(value) +
      "; expected an expert in [0, " + std::to_string(config_.num_experts) + ") or -1 for none");
}

Algorithm NcclTransport::algorithm(const Plan& plan) const {
  if (options_.algorithm != Algorithm::kAuto) return options_.algorithm;
  return plan.host_sync ? Algorithm::kExact : Algorithm::kStatic;
}

void NcclTransport::check_fits(const char* what, int64_t row_bytes, int64_t scale_bytes) const {
  const int64_t widest = int64_t{config_.hidden} * dtype_bytes(config_.dtype);
  EPCOMM_CHECK(row_bytes + scale_bytes <= widest,
               std::string(what) + " has " + std::to_string(row_bytes + scale_bytes) +
                   " bytes per row with its scales; expected at most the " +
                   std::to_string(widest) + " bytes of a row of the Buffer's dtype");
}

RouteResult NcclTransport::route(const RouteArgs& args) {
  EPCOMM_CHECK(args.host_sync || options_.algorithm != Algorithm::kExact,
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
  for (int r = 0; r < num_ranks_; ++r)
    if (const int bad = word(r, AnnounceLayout::kBadIndex); bad != 0)
      throw bad_index(r, bad - 1, args.topk, word(r, AnnounceLayout::kBadValue));
  RouteResult result;
  result.chunk_count.resize(static_cast<size_t>(options_.chunks * num_ranks_ * num_ranks_));
  for (int c = 0; c < options_.chunks; ++c)
    for (int s = 0; s < num_ranks_; ++s)
      for (int d = 0; d < num_ranks_; ++d)
        result.chunk_count[static_cast<size_t>((c * num_ranks_ + s) * num_ranks_ + d)] =
            word(s, announce_layout_.chunk_count(c) + d);
  const Counts counts{result, num_ranks_, options_.chunks};
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

// ---- dispatch ----

NcclTransport::Region NcclTransport::region(char* base, int64_t rows, const RowSpec& spec) {
  const size_t n = static_cast<size_t>(rows);
  Region r{base, nullptr, nullptr};
  r.scales = r.x + align_up(n * static_cast<size_t>(spec.row_bytes), 16);
  r.meta = r.scales + align_up(n * static_cast<size_t>(spec.scale_bytes), 16);
  return r;
}

size_t NcclTransport::region_bytes(int64_t rows, const RowSpec& spec, size_t record_bytes) const {
  const Region r = region(nullptr, rows, spec);
  return static_cast<size_t>(r.meta - r.x) + static_cast<size_t>(rows) * record_bytes;
}

PackArgs NcclTransport::pack_args(const Plan& plan, const DispatchArgs& args) const {
  PackArgs p{};
  p.dims = dims_;
  p.dims.topk = plan.topk;
  p.rows = {args.row_bytes, args.scale_bytes};
  p.rank = rank_;
  p.chunk = 0;
  p.chunks = 1;
  p.num_tokens = plan.num_tokens;
  p.x = static_cast<const char*>(args.x);
  p.scales = static_cast<const char*>(args.scales);
  p.topk_weights = args.topk_weights;
  p.experts = {expert_rank_.as<int32_t>(), expert_local_.as<int32_t>()};
  p.plan = plan.view;
  return p;
}

PlaceArgs NcclTransport::place_args(const Plan& plan, const DispatchArgs& args) const {
  PlaceArgs p{};
  p.dims = dims_;
  p.dims.topk = plan.topk;
  p.rows = {args.row_bytes, args.scale_bytes};
  p.layout = plan.layout;
  p.rank = rank_;
  p.index_type = args.index_type;
  p.recv_capacity = args.recv_capacity;
  p.row_capacity = args.row_capacity;
  p.experts = {expert_rank_.as<int32_t>(), expert_local_.as<int32_t>()};
  p.plan = plan.view;
  p.recv_x = static_cast<char*>(args.recv_x);
  p.recv_scales = static_cast<char*>(args.recv_scales);
  p.recv_topk_idx = args.recv_topk_idx;
  p.recv_topk_weights = args.recv_topk_weights;
  return p;
}

void NcclTransport::dispatch(const Plan& plan, const DispatchArgs& args) {
  check_fits("x", args.row_bytes, args.scale_bytes);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, Operation::kDispatch, stream);
  switch (algorithm(plan)) {
    case Algorithm::kExact:
      dispatch_exact(plan, args, stream);
      break;
    case Algorithm::kAllGather:
      dispatch_gathered(plan, args, stream);
      break;
    default:
      dispatch_static(plan, args, stream);
  }
  call.end();
}

void NcclTransport::dispatch_exact(const Plan& plan, const DispatchArgs& args,
                                   cudaStream_t stream) {
  const Counts counts{plan.result, num_ranks_, options_.chunks};
  const RowSpec spec{args.row_bytes, args.scale_bytes};
  const size_t record = MetaLayout(plan.topk).record_bytes;
  const size_t row = static_cast<size_t>(spec.row_bytes),
               scale = static_cast<size_t>(spec.scale_bytes);
  const bool in_place = plan.layout == Layout::kToken;
  const Region send = region(send_.get(), counts.send_base(rank_, num_ranks_), spec);
  Region recv = region(stage_.get(), plan.result.num_recv_tokens, spec);
  if (in_place)
    recv = {static_cast<char*>(args.recv_x), static_cast<char*>(args.recv_scales), nullptr};
  recv.meta = static_cast<char*>(plan.view.recv_meta);
  auto shifted = [&](const Region& r, int64_t n) {
    const size_t i = static_cast<size_t>(n);
    return PackTarget{r.x + i * row, r.scales + i * scale, r.meta + i * record};
  };

  PackArgs pack = pack_args(plan, args);
  PlaceArgs place = place_args(plan, args);
  for (int r = 0; r < num_ranks_; ++r) {
    pack.target[r] = r == rank_ ? shifted(recv, counts.recv_base(r, r))
                                : shifted(send, counts.send_base(rank_, r));
    place.source[r] = shifted(recv, counts.recv_base(r, rank_));
    if (in_place) place.source[r].x = place.source[r].scales = nullptr;
  }
  pack.chunks = options_.chunks;
  launch_pack(pack, args.num_sms, stream);
  EPCOMM_CUDA_TRY(cudaEventRecord(fork_.get(), stream));
  for (int c = 0; c < options_.chunks; ++c) {
    if (c > 0) EPCOMM_CUDA_TRY(cudaStreamWaitEvent(stream, chunk_done_[c].get(), 0));
    std::vector<Message> messages;
    for (int i = 1; i < num_ranks_; ++i) {
      const int peer = (rank_ + i) % num_ranks_;
      const size_t out = static_cast<size_t>(counts.chunk(c, rank_, peer)),
                   in = static_cast<size_t>(counts.chunk(c, peer, rank_));
      const PackTarget from =
          shifted(send, counts.send_base(rank_, peer) + counts.before(c, rank_, peer));
      const PackTarget to =
          shifted(recv, counts.recv_base(peer, rank_) + counts.before(c, peer, rank_));
      messages.push_back({peer, from.x, out * row, to.x, in * row});
      messages.push_back({peer, from.scales, out * scale, to.scales, in * scale});
      messages.push_back({peer, from.meta, out * record, to.meta, in * record});
    }
    comm_.exchange(messages, options_.schedule, stream);
    if (c > 0 || options_.chunks == 1) continue;
    // After the first exchange, so that NCCL's kernel is there first and gets its SMs.
    EPCOMM_CUDA_TRY(cudaStreamWaitEvent(side_.get(), fork_.get(), 0));
    for (pack.chunk = 1; pack.chunk < options_.chunks; ++pack.chunk) {
      launch_pack(pack, beside(args.num_sms), side_.get());
      EPCOMM_CUDA_TRY(cudaEventRecord(chunk_done_[pack.chunk].get(), side_.get()));
    }
  }
  if (!in_place) launch_clear_outputs(place, stream);
  launch_place(place, args.num_sms, stream);
}

void NcclTransport::dispatch_static(const Plan& plan, const DispatchArgs& args,
                                    cudaStream_t stream) {
  const RowSpec spec{args.row_bytes, args.scale_bytes};
  const size_t record = MetaLayout(plan.topk).record_bytes;
  const size_t block = align_up(region_bytes(config_.max_tokens, spec, record), 16);
  PackArgs pack = pack_args(plan, args);
  PlaceArgs place = place_args(plan, args);
  std::vector<Message> messages;
  for (int i = 0; i < num_ranks_; ++i) {
    const int peer = (rank_ + i) % num_ranks_;
    char* from = (peer == rank_ ? stage_ : send_).get() + static_cast<size_t>(peer) * block;
    char* to = stage_.get() + static_cast<size_t>(peer) * block;
    const Region out = region(from, config_.max_tokens, spec),
                 in = region(to, config_.max_tokens, spec);
    pack.target[peer] = {out.x, out.scales, out.meta};
    place.source[peer] = {in.x, in.scales, in.meta};
    if (peer != rank_) messages.push_back({peer, from, block, to, block});
  }
  launch_pack(pack, args.num_sms, stream);
  comm_.exchange(messages, options_.schedule, stream);
  launch_clear_outputs(place, stream);
  launch_place(place, args.num_sms, stream);
}

void NcclTransport::dispatch_gathered(const Plan& plan, const DispatchArgs& args,
                                      cudaStream_t stream) {
  const size_t capacity = static_cast<size_t>(config_.max_tokens),
               ranks = static_cast<size_t>(num_ranks_);
  GatheredArgs g{};
  g.place = place_args(plan, args);
  g.capacity = config_.max_tokens;
  g.announced = plan.view.announced;
  char* send = send_.get();
  char* recv = stage_.get();
  // Each array is padded to max_tokens rows, so that all ranks give the same number of bytes.
  auto gather = [&](const void* data, size_t row) {
    const size_t bytes = align_up(capacity * row, 16);
    EPCOMM_CUDA_TRY(cudaMemcpyAsync(send, data, static_cast<size_t>(plan.num_tokens) * row,
                                    cudaMemcpyDeviceToDevice, stream));
    comm_.all_gather(send, recv, bytes, stream);
    char* gathered = recv;
    send += bytes;
    recv += bytes * ranks;
    return gathered;
  };
  const size_t topk = static_cast<size_t>(plan.topk);
  g.x = gather(args.x, static_cast<size_t>(args.row_bytes));
  if (args.scale_bytes != 0) g.scales = gather(args.scales, static_cast<size_t>(args.scale_bytes));
  g.topk_idx = reinterpret_cast<int32_t*>(gather(plan.view.topk_idx, topk * 4));
  g.row = reinterpret_cast<int32_t*>(gather(plan.view.row, topk * 4));
  g.slot = reinterpret_cast<int32_t*>(gather(plan.view.slot, ranks * 4));
  if (args.topk_weights != nullptr)
    g.topk_weights = reinterpret_cast<float*>(gather(args.topk_weights, topk * 4));
  launch_clear_outputs(g.place, stream);
  launch_place_gathered(g, args.num_sms, stream);
}

// ---- combine ----

PartialArgs NcclTransport::partial_args(const Plan& plan, const CombineArgs& args,
                                        cudaStream_t stream) {
  PartialArgs p{};
  p.dims = dims_;
  p.dims.topk = plan.topk;
  p.rank = rank_;
  p.dtype = args.dtype;
  p.hidden = args.hidden;
  p.chunk = 0;
  p.chunks = 1;
  p.announced = plan.view.announced;
  p.x = static_cast<const char*>(args.x);
  p.plan = plan.view;
  if (args.topk_weights != nullptr) {
    // The sums are made where the rows are, so every rank needs the weights of all tokens: few
    // bytes.
    const size_t bytes =
        static_cast<size_t>(config_.max_tokens) * static_cast<size_t>(plan.topk) * sizeof(float);
    char* mine = weights_.get() + bytes * static_cast<size_t>(num_ranks_);
    EPCOMM_CUDA_TRY(cudaMemcpyAsync(
        mine, args.topk_weights,
        static_cast<size_t>(plan.num_tokens) * static_cast<size_t>(plan.topk) * sizeof(float),
        cudaMemcpyDeviceToDevice, stream));
    comm_.all_gather(mine, weights_.get(), bytes, stream);
    p.topk_weights = weights_.as<float>();
    p.weight_stride = config_.max_tokens;
  }
  return p;
}

SumArgs NcclTransport::sum_args(const Plan& plan, const CombineArgs& args) const {
  SumArgs s{};
  s.dims = dims_;
  s.dims.topk = plan.topk;
  s.rank = rank_;
  s.dtype = args.dtype;
  s.hidden = args.hidden;
  s.num_tokens = plan.num_tokens;
  s.chunk = 0;
  s.chunks = 1;
  s.plan = plan.view;
  s.bias = args.bias;
  s.out = args.out;
  return s;
}

void NcclTransport::combine(const Plan& plan, const CombineArgs& args) {
  check_fits("x", int64_t{args.hidden} * dtype_bytes(args.dtype), 0);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, Operation::kCombine, stream);
  switch (algorithm(plan)) {
    case Algorithm::kExact:
      combine_exact(plan, args, stream);
      break;
    case Algorithm::kAllGather:
      combine_gathered(plan, args, stream);
      break;
    default:
      combine_static(plan, args, stream);
  }
  call.end();
}

void NcclTransport::combine_exact(const Plan& plan, const CombineArgs& args, cudaStream_t stream) {
  const Counts counts{plan.result, num_ranks_, options_.chunks};
  const size_t row =
      static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
  PartialArgs partials = partial_args(plan, args, stream);
  SumArgs sum = sum_args(plan, args);
  // Without weights a row of layout "token" is a partial row already, and is sent from where it
  // lies.
  const bool in_place = plan.layout == Layout::kToken && args.topk_weights == nullptr;
  char* from = in_place ? const_cast<char*>(partials.x) : send_.get();
  auto outgoing = [&](int owner, int c) {
    return from +
           static_cast<size_t>(counts.recv_base(owner, rank_) + counts.before(c, owner, rank_)) *
               row;
  };
  auto incoming = [&](int peer, int c) {
    return stage_.get() +
           static_cast<size_t>(counts.send_base(rank_, peer) + counts.before(c, rank_, peer)) * row;
  };
  for (int r = 0; r < num_ranks_; ++r) {
    partials.target[r] = outgoing(r, 0);
    sum.partial[r] = r == rank_ ? outgoing(r, 0) : incoming(r, 0);
  }
  partials.chunks = sum.chunks = options_.chunks;
  for (int c = options_.chunks - 1; c >= 0; --c) {  // the small one last: its sum overlaps nothing
    partials.chunk = sum.chunk = c;
    if (!in_place) launch_partials(partials, args.num_sms, stream);
    std::vector<Message> messages;
    for (int i = 1; i < num_ranks_; ++i) {
      const int peer = (rank_ + i) % num_ranks_;
      messages.push_back(
          {peer, outgoing(peer, c), static_cast<size_t>(counts.chunk(c, peer, rank_)) * row,
           incoming(peer, c), static_cast<size_t>(counts.chunk(c, rank_, peer)) * row});
    }
    comm_.exchange(messages, options_.schedule, stream);
    if (c == 0) break;
    order_after(side_.get(), stream, chunk_done_[c]);
    launch_sum(sum, beside(args.num_sms), side_.get());
  }
  launch_sum(sum, args.num_sms, stream);
  if (options_.chunks > 1) order_after(stream, side_.get(), join_);
}

void NcclTransport::combine_static(const Plan& plan, const CombineArgs& args, cudaStream_t stream) {
  const size_t row =
      static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
  const size_t block = static_cast<size_t>(config_.max_tokens) * row;
  PartialArgs partials = partial_args(plan, args, stream);
  SumArgs sum = sum_args(plan, args);
  std::vector<Message> messages;
  for (int i = 0; i < num_ranks_; ++i) {
    const int peer = (rank_ + i) % num_ranks_;
    char* out = (peer == rank_ ? stage_ : send_).get() + static_cast<size_t>(peer) * block;
    char* in = stage_.get() + static_cast<size_t>(peer) * block;
    partials.target[peer] = out;
    sum.partial[peer] = in;
    if (peer != rank_) messages.push_back({peer, out, block, in, block});
  }
  launch_partials(partials, args.num_sms, stream);
  comm_.exchange(messages, options_.schedule, stream);
  launch_sum(sum, args.num_sms, stream);
}

void NcclTransport::combine_gathered(const Plan& plan, const CombineArgs& args,
                                     cudaStream_t stream) {
  const size_t count = static_cast<size_t>(config_.max_tokens) * static_cast<size_t>(args.hidden);
  const PartialArgs partials = partial_args(plan, args, stream);
  EPCOMM_CUDA_TRY(cudaMemsetAsync(send_.get(), 0,
                                  static_cast<size_t>(num_ranks_) * count * sizeof(float), stream));
  launch_dense_partials(partials, send_.as<float>(), config_.max_tokens, args.num_sms, stream);
  comm_.reduce_scatter(send_.as<float>(), stage_.as<float>(), count, stream);
  launch_finish(stage_.as<float>(), args.bias, args.out, args.dtype,
                int64_t{plan.num_tokens} * args.hidden, stream);
}

}  // namespace

std::unique_ptr<Transport> make_nccl_transport(const TransportContext& context) {
  EPCOMM_CHECK(context.bootstrap.size() <= kMaxPackRanks,
               "the nccl transport takes at most " + std::to_string(kMaxPackRanks) +
                   " ranks; this group has " + std::to_string(context.bootstrap.size()));
  return std::make_unique<NcclTransport>(context);
}

}  // namespace epcomm
