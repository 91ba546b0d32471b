// What every transport shares: agreement between ranks when a Buffer is made, and the checks that
// refuse a call before any peer can see it.
#include "epcomm/buffer.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "core/checks.h"
#include "core/expert_map.h"
#include "core/plan_state.h"
#include "core/recv_rows.h"
#include "epcomm/quant.h"
#include "kernels/node_layout.h"
#include "kernels/rail_layout.h"
#include "kernels/token_layout.h"
#include "transport/transport.h"

#ifndef EPCOMM_VERSION
#error "EPCOMM_VERSION is set by the build"
#endif

namespace epcomm {
namespace {

// What ranks tell each other about their options; plain bytes of one size.
struct Agreement {
  char transport[24];
  int64_t num_experts, hidden, topk, max_tokens, dtype, expert_to_rank, ranks_per_node;
  int64_t window_bytes, timeout_ms;
  char transport_options[256];
  char refusal[320];  // why this rank cannot take part; empty = it can
};

struct AgreementField {
  const char* name;
  std::string (*text)(const Agreement&);
};

constexpr AgreementField kAgreementFields[] = {
    {"transport", [](const Agreement& a) { return std::string(a.transport); }},
    {"transport_options", [](const Agreement& a) { return std::string(a.transport_options); }},
    {"num_experts", [](const Agreement& a) { return std::to_string(a.num_experts); }},
    {"hidden", [](const Agreement& a) { return std::to_string(a.hidden); }},
    {"topk", [](const Agreement& a) { return std::to_string(a.topk); }},
    {"max_tokens", [](const Agreement& a) { return std::to_string(a.max_tokens); }},
    {"dtype",
     [](const Agreement& a) -> std::string {
       const char* names[] = {"none", "bfloat16", "float16", "float32"};
       return a.dtype >= 0 && a.dtype < 4 ? names[a.dtype] : std::to_string(a.dtype);
     }},
    {"expert_to_rank",
     [](const Agreement& a) { return "table #" + std::to_string(a.expert_to_rank); }},
    {"ranks_per_node", [](const Agreement& a) { return std::to_string(a.ranks_per_node); }},
    {"window_bytes", [](const Agreement& a) { return std::to_string(a.window_bytes); }},
    {"timeout", [](const Agreement& a) { return std::to_string(a.timeout_ms) + " ms"; }},
};

template <size_t N>
void copy_text(char (&to)[N], const std::string& from) {
  std::strncpy(to, from.c_str(), N - 1);
}

// FNV-1a, to compare tables without sending them (http://www.isthe.com/chongo/tech/comp/fnv).
int64_t table_hash(const std::vector<int32_t>& table) {
  uint64_t hash = 14695981039346656037u;
  for (int32_t v : table) hash = (hash ^ static_cast<uint32_t>(v)) * 1099511628211u;
  return static_cast<int64_t>(hash);
}

void check_options(const BufferOptions& o, int num_ranks) {
  const Config& c = o.config;
  auto expect = [](const char* name, int64_t value, const std::string& what) {
    return std::string(name) + " is " + std::to_string(value) + "; expected " + what;
  };
  EPCOMM_CHECK(c.num_experts >= 1, expect("num_experts", c.num_experts, "at least 1"));
  EPCOMM_CHECK(c.topk >= 1 && c.topk <= kMaxTopk,
               expect("topk", c.topk, "1 to " + std::to_string(kMaxTopk)));
  EPCOMM_CHECK(c.max_tokens >= 1, expect("max_tokens", c.max_tokens, "at least 1"));
  EPCOMM_CHECK(
      c.dtype == Dtype::kBfloat16 || c.dtype == Dtype::kFloat16 || c.dtype == Dtype::kFloat32,
      "dtype is not a row type; expected bfloat16, float16 or float32");
  const int64_t row_bytes = int64_t{c.hidden} * dtype_bytes(c.dtype);
  EPCOMM_CHECK(
      c.hidden >= 1 && row_bytes % kRowAlignment == 0 && row_bytes < (1 << 30),
      expect("hidden", c.hidden,
             "a row of hidden elements to be a multiple of 16 bytes, below 1 GiB; this one has " +
                 std::to_string(row_bytes) + " bytes, pad hidden"));
  EPCOMM_CHECK(int64_t{c.max_tokens} * num_ranks * kMaxTopk < INT32_MAX,
               expect("max_tokens", c.max_tokens,
                      "max_tokens * num_ranks * 32 below 2^31; dispatch in smaller batches"));
  EPCOMM_CHECK(o.ranks_per_node >= 0, expect("ranks_per_node", o.ranks_per_node,
                                             "at least 1, or 0 for all ranks in one node"));
  EPCOMM_CHECK(o.timeout_s > 0 && o.timeout_s < 1e6, "timeout is " + std::to_string(o.timeout_s) +
                                                         " s; expected more than 0, less than 1e6");
}

TransportFactory find_transport(const std::string& name) {
  for (const TransportEntry& entry : transports())
    if (name == entry.name) return entry.make;
  std::string known;
  for (const std::string& n : transport_names()) known += (known.empty() ? "" : ", ") + n;
  throw InvalidArgument("transport is '" + name + "'; this build has: " + known);
}

std::string value(const char* name, int64_t is, const char* what, int64_t expected) {
  return std::string(name) + " is " + std::to_string(is) + "; expected " + what +
         std::to_string(expected);
}

// Starts at its own address, so that ids differ between the extension modules of a process.
std::atomic<uint64_t> next_buffer_id{reinterpret_cast<uintptr_t>(&next_buffer_id)};

}  // namespace

struct Buffer::State {
  State(const Bootstrap& bootstrap, BufferOptions o, ExpertMap e)
      : rank(bootstrap.rank()),
        num_ranks(bootstrap.size()),
        options(std::move(o)),
        experts(std::move(e)) {}

  int rank, num_ranks;
  BufferOptions options;
  ExpertMap experts;
  uint64_t id = next_buffer_id++;
  pid_t pid = ::getpid();
  std::unique_ptr<Transport> transport;
  Caps caps;

  Dims dims(int topk) const {
    const NodeMap nodes{num_ranks, options.ranks_per_node};
    return {num_ranks, options.config.num_experts,           experts.local_experts(rank), topk,
            caps.cuda, caps.forwards ? nodes.num_nodes() : 0};
  }
  PlanSendLayout send_layout(int topk, int64_t num_tokens) const {
    const NodeMap nodes{num_ranks, options.ranks_per_node};
    const ForwardedLayout kept{topk, nodes.size(nodes.node(rank)), options.config.max_tokens};
    const bool keeps = caps.cuda && caps.forwards;
    return {dims(topk), num_tokens, keeps ? kept.words(nodes.num_sources(rank)) : 0};
  }
  // Most rows that a rank with so many experts can receive in one call.
  int64_t max_recv_rows(const RouteArgs& args, int64_t local_experts) const {
    return most_recv_rows(args.layout, int64_t{num_ranks} * options.config.max_tokens, args.topk,
                          local_experts, args.expert_alignment);
  }
  Transport& usable() const {
    if (transport == nullptr) throw BufferUnusable("this Buffer was destroyed; make a new one");
    if (::getpid() != pid)
      throw BufferUnusable("this Buffer belongs to process " + std::to_string(pid) +
                           "; a forked process (" + std::to_string(::getpid()) +
                           ") cannot use it: make a Buffer in the process that uses it");
    return *transport;
  }
  void check_phase(Phase phase) const {
    EPCOMM_CHECK(phase == Phase::kAll || caps.two_phases,
                 "phase is one half of a call; this Buffer's " + options.transport +
                     " transport offers whole calls only");
  }
  Transport& usable(const Plan& plan) const {
    Transport& t = usable();
    EPCOMM_CHECK(plan.buffer_id == id,
                 "plan was made by another Buffer (id " + std::to_string(plan.buffer_id) +
                     "); expected one made by this Buffer (id " + std::to_string(id) + ")");
    return t;
  }
};

namespace {

// Throws ConfigMismatch if the ranks' values of a field are not all the same.
void compare(const char* field, const std::vector<std::string>& values) {
  if (std::any_of(values.begin(), values.end(),
                  [&](const std::string& v) { return v != values[0]; }))
    throw ConfigMismatch(field, values);
}

// Versions are exchanged first and alone: what follows may differ between them.
void agree_on_version(Bootstrap& bootstrap) {
  struct Version {
    char text[32];
  };
  Version mine{};
  copy_text(mine.text, EPCOMM_VERSION);
  std::vector<Version> all(static_cast<size_t>(bootstrap.size()));
  bootstrap.all_gather(&mine, all.data(), sizeof mine);
  std::vector<std::string> values;
  for (const Version& v : all) values.emplace_back(v.text, strnlen(v.text, sizeof v.text));
  compare("version", values);
}

// Collective: every rank tells its options, all compare. A rank that refuses its own options still
// takes part, so that the others learn of it at once.
void agree(Bootstrap& bootstrap, const BufferOptions& options, const std::vector<int32_t>& owners,
           const std::string& refusal) {
  agree_on_version(bootstrap);
  Agreement mine{};
  copy_text(mine.transport, options.transport);
  copy_text(mine.refusal, refusal);
  std::string transport_options;
  for (const auto& [name, value] : options.transport_options)
    transport_options += name + "=" + value + " ";
  copy_text(mine.transport_options, transport_options);
  const Config& c = options.config;
  mine.num_experts = c.num_experts;
  mine.hidden = c.hidden;
  mine.topk = c.topk;
  mine.max_tokens = c.max_tokens;
  mine.dtype = static_cast<int64_t>(c.dtype);
  mine.expert_to_rank = table_hash(owners);
  mine.ranks_per_node = options.ranks_per_node;
  mine.window_bytes = static_cast<int64_t>(options.window_bytes);
  mine.timeout_ms = static_cast<int64_t>(options.timeout_s * 1e3);
  std::vector<Agreement> all(static_cast<size_t>(bootstrap.size()));
  bootstrap.all_gather(&mine, all.data(), sizeof mine);

  if (!refusal.empty()) throw InvalidArgument(refusal);
  for (size_t r = 0; r < all.size(); ++r)
    if (all[r].refusal[0] != 0)
      throw InvalidArgument("rank " + std::to_string(r) +
                            " refused its options: " + all[r].refusal);
  for (const AgreementField& field : kAgreementFields) {
    std::vector<std::string> values;
    for (const Agreement& a : all) values.push_back(field.text(a));
    compare(field.name, values);
  }
}

}  // namespace

void refuse(Bootstrap& bootstrap, const std::string& why) {
  try {
    agree(bootstrap, {}, {}, why);
  } catch (const InvalidArgument&) {  // what this rank told the others
  }
}

Buffer::Buffer(std::shared_ptr<Bootstrap> bootstrap, BufferOptions options) {
  const int num_ranks = bootstrap->size();
  std::string refusal;
  std::optional<ExpertMap> experts;
  TransportFactory make = nullptr;
  try {
    check_options(options, num_ranks);
    experts.emplace(options.config.num_experts, num_ranks, options.expert_to_rank);
    make = find_transport(options.transport);
  } catch (const InvalidArgument& e) {
    refusal = e.what();
  }
  agree(*bootstrap, options, experts ? experts->ranks() : std::vector<int32_t>{}, refusal);
  state_ = std::make_unique<State>(*bootstrap, std::move(options), std::move(*experts));
  state_->transport = make({*bootstrap, state_->options, state_->experts});
  state_->caps = state_->transport->caps();
}

std::vector<std::string> transport_names() {
  std::vector<std::string> names;
  for (const TransportEntry& entry : transports()) names.emplace_back(entry.name);
  return names;
}

Buffer::~Buffer() {
  // In a forked child the transport's threads and its GPU state are the parent's: left alone.
  if (state_ != nullptr && ::getpid() != state_->pid) (void)state_->transport.release();
}

void Buffer::check_usable() const { state_->usable().check(); }

void Buffer::check_faults() const {
  if (state_->transport != nullptr && ::getpid() == state_->pid) state_->transport->check();
}

int Buffer::rank() const { return state_->rank; }
int Buffer::num_ranks() const { return state_->num_ranks; }
uint64_t Buffer::id() const { return state_->id; }
const Config& Buffer::config() const { return state_->options.config; }
const Caps& Buffer::caps() const { return state_->caps; }
const std::string& Buffer::transport() const { return state_->options.transport; }
std::string Buffer::choice() const { return state_->usable().choice(); }
int Buffer::local_experts() const { return state_->experts.local_experts(rank()); }
int Buffer::max_local_experts() const { return state_->experts.max_local_experts(); }

SendBlock Buffer::send_block(int num_tokens, int topk) const {
  const PlanSendLayout layout = state_->send_layout(topk, num_tokens);
  return {layout.bytes,         layout.rank_count,        layout.expert_count,
          layout.expert_offset, layout.tokens_per_expert, layout.num_recv};
}

PlanView Buffer::view_send_block(void* block, int num_tokens, int topk) const {
  PlanView view;
  set_send_block(view, block, state_->send_layout(topk, num_tokens));
  return view;
}

size_t Buffer::recv_meta_bytes(int topk, int num_recv) const {
  return MetaLayout(topk).record_bytes * static_cast<size_t>(num_recv);
}

size_t Buffer::recv_block_bytes(const Plan& plan, int num_recv) const {
  return recv_meta_bytes(plan.topk, num_recv) + state_->usable(plan).forward_bytes(plan);
}

int64_t Buffer::max_recv_tokens() const { return int64_t{num_ranks()} * config().max_tokens; }

int64_t Buffer::max_recv_rows(Layout layout, int topk, int expert_alignment) const {
  RouteArgs args;
  args.layout = layout;
  args.topk = topk;
  args.expert_alignment = expert_alignment;
  return state_->max_recv_rows(args, local_experts());
}

Allocation Buffer::allocate(size_t bytes) { return state_->usable().allocate(bytes); }
size_t Buffer::free_bytes() const { return state_->usable().free_bytes(); }

Plan Buffer::route(const RouteArgs& args) {
  Transport& transport = state_->usable();
  const Config& c = config();
  EPCOMM_CHECK(state_->caps.takes(args.layout),
               "layout is not offered by the " + this->transport() + " transport");
  EPCOMM_CHECK(args.num_tokens >= 0 && args.num_tokens <= c.max_tokens,
               value("num_tokens", args.num_tokens, "at most max_tokens = ", c.max_tokens) +
                   "; make the Buffer with a larger max_tokens or dispatch in smaller batches");
  EPCOMM_CHECK(args.topk >= 1 && args.topk <= c.topk,
               value("topk", args.topk, "1 to the Buffer's topk = ", c.topk));
  EPCOMM_CHECK(args.expert_alignment >= 1 && args.expert_alignment <= (1 << 20),
               value("expert_alignment", args.expert_alignment, "1 to ", 1 << 20));
  EPCOMM_CHECK(!args.ahead || (args.host_sync && state_->caps.sends_ahead),
               "ahead is set; expected host_sync and a transport that offers it");
  // The rank with the most experts decides for all, so that all refuse or none.
  EPCOMM_CHECK(
      state_->max_recv_rows(args, max_local_experts()) < INT32_MAX,
      "the receive tensor of this layout would need 2^31 rows or more; use a smaller max_tokens");
  if (!state_->caps.cuda) {  // device-side transports check ids where they are
    for (int64_t i = 0; i < int64_t{args.num_tokens} * args.topk; ++i) {
      const int64_t id = args.index_type == IndexType::kInt32
                             ? static_cast<const int32_t*>(args.topk_idx)[i]
                             : static_cast<const int64_t*>(args.topk_idx)[i];
      EPCOMM_CHECK(id >= -1 && id < c.num_experts,
                   bad_expert_id(rank(), i, args.topk, id, c.num_experts));
      args.plan.topk_idx[i] = static_cast<int32_t>(id);
    }
  }
  Plan plan;
  plan.buffer_id = state_->id;
  plan.layout = args.layout;
  plan.expert_alignment = args.expert_alignment;
  plan.num_tokens = args.num_tokens;
  plan.topk = args.topk;
  plan.host_sync = args.host_sync;
  plan.view = args.plan;
  plan.result = transport.route(args);
  return plan;
}

Plan Buffer::restore(const std::vector<int64_t>& state, void* send_block) const {
  Plan plan = plan_from_state(state);
  (void)state_->usable(plan);
  const bool sizes_are_ours = plan.num_tokens >= 0 && plan.num_tokens <= config().max_tokens &&
                              plan.topk >= 1 && plan.topk <= config().topk;
  EPCOMM_CHECK(sizes_are_ours, "state is not that of a plan: it says num_tokens = " +
                                   std::to_string(plan.num_tokens) +
                                   ", topk = " + std::to_string(plan.topk));
  plan.view = view_send_block(send_block, plan.num_tokens, plan.topk);
  return plan;
}

namespace {

void check_quant(uint32_t offered, Quant quant, const char* step) {
  EPCOMM_CHECK((offered & Caps::bit(quant)) != 0,
               "quant " + std::to_string(static_cast<int>(quant)) + " of " + step +
                   " is not offered by this transport");
}

// rows: of one matrix of received scales.
void check_scale_columns(const Caps& caps, int64_t rows, const DispatchArgs& args) {
  if (args.recv_scale_columns == nullptr) return;
  EPCOMM_CHECK(caps.column_scales, "column-major scales are not offered by this transport");
  EPCOMM_CHECK(args.scale_bytes % 4 == 0,
               value("scale_bytes", args.scale_bytes, "with recv_scale_columns a multiple of ", 4));
  EPCOMM_CHECK(args.scale_column_bytes % 16 == 0 && args.scale_column_bytes >= 4 * rows,
               value("scale_column_bytes", args.scale_column_bytes, "a multiple of 16, at least ",
                     4 * rows));
}

}  // namespace

void Buffer::dispatch(const Plan& plan, const DispatchArgs& args) {
  Transport& transport = state_->usable(plan);
  EPCOMM_CHECK(args.row_bytes > 0 && args.row_bytes % kRowAlignment == 0,
               value("row_bytes", args.row_bytes, "a positive multiple of ", kRowAlignment));
  EPCOMM_CHECK(args.scale_bytes >= 0, value("scale_bytes", args.scale_bytes, "at least ", 0));
  if (args.quant != Quant::kNone) {
    check_quant(state_->caps.fused_quants, args.quant, "dispatch");
    const QuantLayout layout = quant_layout(args.quant, config().hidden);
    EPCOMM_CHECK(
        args.row_bytes == layout.row_bytes && args.scale_bytes == layout.wire_scale_bytes,
        value("row_bytes", args.row_bytes, "what quant makes of a row: ", layout.row_bytes) + ", " +
            value("scale_bytes", args.scale_bytes, "", layout.wire_scale_bytes));
    EPCOMM_CHECK(args.x_dtype == Dtype::kBfloat16 || args.x_dtype == Dtype::kFloat16 ||
                     args.x_dtype == Dtype::kFloat32,
                 "x_dtype of a dispatch with quant must be bfloat16, float16 or float32");
    EPCOMM_CHECK(args.global_scale != nullptr || args.quant != Quant::kNvfp4,
                 "global_scale is missing; nvfp4 needs one");
  } else {
    EPCOMM_CHECK((args.scale_bytes > 0) == (args.scales != nullptr) || plan.num_tokens == 0,
                 "scales and scale_bytes must be given together");
  }
  // A rank that lacks room must still enter: the others are to learn of it.
  if (args.needed_bytes == 0)
    check_scale_columns(state_->caps,
                        plan.layout == Layout::kPadded ? int64_t{num_ranks()} * config().max_tokens
                                                       : int64_t{args.row_capacity},
                        args);
  EPCOMM_CHECK(args.needed_bytes != 0 || plan.attached, "plan has no receive block attached");
  state_->check_phase(args.phase);
  transport.dispatch(plan, args);
}

bool Buffer::settle(Plan& plan) {
  Transport& transport = state_->usable(plan);
  return !plan.result.unsettled || transport.settle(plan);
}

void Buffer::combine(const Plan& plan, const CombineArgs& args) {
  Transport& transport = state_->usable(plan);
  EPCOMM_CHECK(args.dtype == Dtype::kBfloat16 || args.dtype == Dtype::kFloat16 ||
                   args.dtype == Dtype::kFloat32,
               "dtype of combine must be bfloat16, float16 or float32");
  if (args.by_token) {
    const int slots = static_cast<int>(align_up(static_cast<size_t>(plan.topk), 4));
    EPCOMM_CHECK(args.hidden == slots,
                 value("hidden", args.hidden,
                       "topk rounded up to a multiple of 4 with by_token, = ", slots));
    EPCOMM_CHECK(
        args.dtype == Dtype::kFloat32 && args.topk_weights == nullptr && args.quant == Quant::kNone,
        "by_token is set; expected rows of float32, no topk_weights and no quant");
  } else {
    EPCOMM_CHECK(args.hidden == config().hidden,
                 value("hidden", args.hidden, "the Buffer's hidden = ", config().hidden));
  }
  if (args.quant != Quant::kNone) {
    check_quant(state_->caps.combine_quants, args.quant, "combine");
    quant_layout(args.quant, args.hidden);  // says what hidden must be
  }
  EPCOMM_CHECK(plan.attached, "plan was routed but never dispatched; dispatch with it first");
  state_->check_phase(args.phase);
  transport.combine(plan, args);
}

namespace {

LinkCounters& counters_of(Transport& transport, const std::string& name) {
  LinkCounters* counters = transport.link_counters();
  EPCOMM_CHECK(counters != nullptr,
               "link counters are not offered by the " + name +
                   " transport; cpu and hierarchical count, between processes");
  return *counters;
}

}  // namespace

LinkCounters Buffer::link_counters() const { return counters_of(state_->usable(), transport()); }
void Buffer::reset_link_counters() { counters_of(state_->usable(), transport()) = {}; }

void Buffer::set_statistics(const Statistics& statistics) {
  Transport& t = state_->usable();
  auto check = [this](bool offered, const void* given, const char* name) {
    EPCOMM_CHECK(
        offered || given == nullptr,
        std::string(name) + " is given, but not offered by the " + transport() + " transport");
  };
  check(state_->caps.received_tokens, statistics.received_tokens, "received_tokens");
  check(state_->caps.wait_times, statistics.max_wait_ns, "max_wait_ns");
  t.set_statistics(statistics);
}

void Buffer::destroy() {
  if (::getpid() == state_->pid) state_->transport.reset();
}

}  // namespace epcomm
