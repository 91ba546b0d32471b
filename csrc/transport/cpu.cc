// Moves rows between processes of one machine. A row is copied once: from the caller's tensor
// straight into its final place in the tensor that the receiving rank returns, which lies in that
// rank's window.
//
// Window map: control area (ControlLayout), then the arena. Of the arena, each dispatch takes one
// piece for rows and one for metadata (the caller allocates them and keeps them as long as its
// tensors live); each combine takes one piece for partial rows and weights while it runs.
#include "transport/cpu.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "core/host_rows.h"
#include "core/quant_rows.h"
#include "core/window_arena.h"
#include "epcomm/error.h"
#include "epcomm/window.h"
#include "transport/cpu_channel.h"

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

// Bytes of a partial row on its way to the token's rank.
size_t partial_row_bytes(const CombineArgs& args) {
  if (args.quant != Quant::kNone) return fp8_row_bytes(args.hidden);
  return static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
}

class CpuTransport final : public Transport {
 public:
  explicit CpuTransport(const TransportContext& context)
      : experts_(context.experts),
        config_(context.options.config),
        rank_(context.bootstrap.rank()),
        num_ranks_(context.bootstrap.size()),
        dims_{num_ranks_, config_.num_experts, experts_.local_experts(rank_), config_.topk, false},
        window_(make_host_window(context.bootstrap,
                                 ControlLayout(dims_).arena + arena_bytes(context),
                                 context.options.timeout_s)),
        arena_(*window_, ControlLayout(dims_).arena),
        channel_(context.bootstrap, *window_, dims_, context.options.timeout_s) {
    caps_.token_layout = caps_.expert_layout = caps_.padded_layout = true;
    caps_.symmetric_outputs = true;
    caps_.fused_quants =
        Caps::bit(Quant::kFp8) | Caps::bit(Quant::kFp8Ue8m0) | Caps::bit(Quant::kNvfp4);
    caps_.combine_quants = Caps::bit(Quant::kFp8);
  }

  const Caps& caps() const override { return caps_; }
  RouteResult route(const RouteArgs& args) override;
  void dispatch(const Plan& plan, const DispatchArgs& args) override;
  void combine(const Plan& plan, const CombineArgs& args) override;

  Allocation allocate(size_t bytes) override { return arena_.allocate(bytes); }
  size_t free_bytes() const override { return arena_.largest_free(); }

 private:
  // Counts of one route call, from this rank's expert ids.
  void count(const RouteArgs& args, int32_t* counts) const;
  // Row at which peer's group of each expert starts for tokens of this rank.
  void expert_bases(const RouteArgs& args, std::vector<int32_t>& base) const;
  void place(const RouteArgs& args) const;
  void check_outputs(const Plan& plan, const DispatchArgs& args) const;
  void send_rows(const Plan& plan, const DispatchArgs& args, int peer) const;
  void place_received(const Plan& plan, const DispatchArgs& args) const;
  void send_partials(const Plan& plan, const CombineArgs& args, int peer) const;
  void sum_partials(const Plan& plan, const CombineArgs& args, const char* partials) const;

  int32_t received_from(const PlanView& view, int source) const {
    return view.rank_count[source * num_ranks_ + rank_];
  }
  // Index of the first token that destination receives from source.
  int32_t token_base(const PlanView& view, int source, int destination) const {
    int32_t base = 0;
    for (int s = 0; s < source; ++s) base += view.rank_count[s * num_ranks_ + destination];
    return base;
  }
  // Index of source's first partial row from contributor, in contributor order.
  int32_t partial_base(const PlanView& view, int source, int contributor) const {
    int32_t base = 0;
    for (int r = 0; r < contributor; ++r) base += view.rank_count[source * num_ranks_ + r];
    return base;
  }
  char* at(int rank, uint64_t offset) const { return window_->peer(rank) + offset; }
  uint64_t offset_of(const void* p) const {
    return p == nullptr ? 0
                        : static_cast<uint64_t>(static_cast<const char*>(p) - window_->peer(rank_));
  }

  const ExpertMap& experts_;
  Config config_;
  int rank_, num_ranks_;
  Dims dims_;
  Caps caps_;
  std::unique_ptr<Window> window_;
  WindowArena arena_;
  CpuChannel channel_;
};

// An expert named twice by one token counts once: the first slot that names the expert of slot k.
int first_naming(const int32_t* topk_idx, int k) {
  return static_cast<int>(std::find(topk_idx, topk_idx + k, topk_idx[k]) - topk_idx);
}

void CpuTransport::count(const RouteArgs& args, int32_t* counts) const {
  int32_t* per_expert = counts + num_ranks_;
  for (int t = 0; t < args.num_tokens; ++t) {
    const int32_t* idx = args.plan.topk_idx + int64_t{t} * args.topk;
    int32_t* slot = args.plan.slot + int64_t{t} * num_ranks_;
    std::fill_n(slot, num_ranks_, -1);
    for (int k = 0; k < args.topk; ++k) {
      if (idx[k] < 0 || first_naming(idx, k) < k) continue;
      const int owner = experts_.rank(idx[k]);
      if (slot[owner] < 0) slot[owner] = counts[owner]++;
      ++per_expert[idx[k]];
    }
  }
}

void CpuTransport::expert_bases(const RouteArgs& args, std::vector<int32_t>& base) const {
  std::vector<int64_t> end(static_cast<size_t>(num_ranks_), 0);  // of the groups so far, per rank
  const int64_t padded_rows = int64_t{num_ranks_} * config_.max_tokens;
  for (int e = 0; e < config_.num_experts; ++e) {
    const size_t owner = static_cast<size_t>(experts_.rank(e));
    int64_t before = 0, total = 0;
    for (int s = 0; s < num_ranks_; ++s) {
      const int32_t n = args.plan.expert_count[int64_t{s} * config_.num_experts + e];
      if (s < rank_) before += n;
      total += n;
    }
    const bool padded = args.layout == Layout::kPadded;
    const int64_t start = padded ? experts_.local(e) * padded_rows : end[owner];
    base[static_cast<size_t>(e)] = static_cast<int32_t>(start + before);
    end[owner] = padded
                     ? start + padded_rows
                     : static_cast<int64_t>(align_up(static_cast<size_t>(start + total),
                                                     static_cast<size_t>(args.expert_alignment)));
    if (static_cast<int>(owner) == rank_) {
      const int local = experts_.local(e);
      args.plan.tokens_per_expert[local] = static_cast<int32_t>(total);
      args.plan.expert_offset[local] = static_cast<int32_t>(start);
    }
  }
  args.plan.expert_offset[dims_.local_experts] =
      static_cast<int32_t>(end[static_cast<size_t>(rank_)]);
}

void CpuTransport::place(const RouteArgs& args) const {
  std::vector<int32_t> next(static_cast<size_t>(config_.num_experts));
  expert_bases(args, next);
  std::vector<int32_t> base(static_cast<size_t>(num_ranks_));
  for (int r = 0; r < num_ranks_; ++r)
    base[static_cast<size_t>(r)] = token_base(args.plan, rank_, r);
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const int32_t* idx = args.plan.topk_idx + t * args.topk;
    int32_t* row = args.plan.row + t * args.topk;
    int32_t* slot = args.plan.slot + t * num_ranks_;
    for (int r = 0; r < num_ranks_; ++r)
      if (slot[r] >= 0) slot[r] += base[static_cast<size_t>(r)];
    for (int k = 0; k < args.topk; ++k) {
      if (idx[k] < 0)
        row[k] = -1;
      else if (args.layout == Layout::kToken)
        row[k] = slot[experts_.rank(idx[k])];
      else if (const int first = first_naming(idx, k); first < k)
        row[k] = row[first];
      else
        row[k] = next[static_cast<size_t>(idx[k])]++;
    }
  }
}

RouteResult CpuTransport::route(const RouteArgs& args) {
  channel_.begin(Operation::kRoute);
  std::vector<int32_t> counts(static_cast<size_t>(num_ranks_ + config_.num_experts), 0);
  count(args, counts.data());
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
  }
  place(args);
  *args.plan.num_recv = token_base(args.plan, num_ranks_, rank_);

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
void CpuTransport::check_outputs(const Plan& plan, const DispatchArgs& args) const {
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
                 tokens * static_cast<int64_t>(MetaLayout(plan.topk).record_bytes)),
      "recv_x, recv_scales and recv_meta must lie in memory from Buffer::allocate and hold "
      "what the plan receives");
}

void CpuTransport::dispatch(const Plan& plan, const DispatchArgs& args) {
  if (args.needed_bytes == 0) check_outputs(plan, args);
  channel_.begin(Operation::kDispatch);
  Entry entry;
  entry.signature.operation = Operation::kDispatch;
  entry.signature.layout = plan.layout;
  entry.signature.dtype = args.dtype;
  entry.signature.topk = plan.topk;
  entry.signature.expert_alignment = plan.expert_alignment;
  entry.signature.row_bytes = args.row_bytes;
  entry.signature.scale_bytes = args.scale_bytes;
  entry.signature.weighted = args.topk_weights != nullptr;
  entry.signature.plan = static_cast<int32_t>(plan.result.epoch);
  entry.full = args.needed_bytes != 0;
  entry.needed_bytes = args.needed_bytes;
  entry.free_bytes = args.free_bytes;
  if (entry.full == 0) {
    entry.rows = offset_of(args.recv_x);
    entry.scales = offset_of(args.recv_scales);
    entry.meta = offset_of(plan.view.recv_meta);
  }
  channel_.enter_all(entry, nullptr);
  for (int i = 1; i <= num_ranks_; ++i) {  // own rows last; each rank starts with another peer
    const int peer = (rank_ + i) % num_ranks_;
    send_rows(plan, args, peer);
    channel_.signal_done(peer);
  }
  channel_.wait_all_done();
  place_received(plan, args);
}

void CpuTransport::send_rows(const Plan& plan, const DispatchArgs& args, int peer) const {
  const Entry& there = channel_.entry(peer);
  const MetaLayout meta(plan.topk);
  const int topk = plan.topk;
  char* records = at(peer, there.meta);
  char* rows = at(peer, there.rows);
  char* row_scales = at(peer, there.scales);
  RowFormat format{args.quant, args.x_dtype, config_.hidden};
  if (args.quant == Quant::kNvfp4) format.global_scale = *args.global_scale;
  const int64_t x_bytes = int64_t{config_.hidden} * dtype_bytes(args.x_dtype);
  for (int64_t t = 0; t < plan.num_tokens; ++t) {
    const int32_t n = plan.view.slot[t * num_ranks_ + peer];
    if (n < 0) continue;
    const int32_t* idx = plan.view.topk_idx + t * topk;
    int32_t* record_row = meta.row(records, n);
    int64_t first = -1;
    for (int k = 0; k < topk; ++k) {
      const bool there_too = idx[k] >= 0 && experts_.rank(idx[k]) == peer;
      record_row[k] = there_too ? plan.view.row[t * topk + k] : -1;
      if (first < 0) first = record_row[k];
    }
    std::copy_n(idx, topk, meta.topk_idx(records, n));
    if (args.topk_weights != nullptr)
      std::copy_n(args.topk_weights + t * topk, topk, meta.topk_weights(records, n));
    *meta.token(records, n) = static_cast<int32_t>(t);
    if (args.quant != Quant::kNone) {
      quantize_wire_row(format, static_cast<const char*>(args.x) + t * x_bytes,
                        rows + first * args.row_bytes, row_scales + first * args.scale_bytes);
      continue;
    }
    copy_row(rows, first, args.x, t, args.row_bytes);
    copy_row(row_scales, first, args.scales, t, args.scale_bytes);
  }
}

// What remains for the receiver: the tensors of expert ids and weights, and the copies of a token
// that several local experts want.
void CpuTransport::place_received(const Plan& plan, const DispatchArgs& args) const {
  const int topk = plan.topk;
  const bool by_token = plan.layout == Layout::kToken;
  const MetaLayout meta(topk);
  const int64_t entries = by_token ? int64_t{args.recv_capacity} * topk : args.row_capacity;
  if (args.recv_topk_idx != nullptr)
    std::memset(args.recv_topk_idx, 0xff,
                static_cast<size_t>(entries) * static_cast<size_t>(args.index_type));
  if (args.recv_topk_weights != nullptr) std::fill_n(args.recv_topk_weights, entries, 0.0f);

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

void CpuTransport::combine(const Plan& plan, const CombineArgs& args) {
  channel_.begin(Operation::kCombine);
  const size_t row_bytes = partial_row_bytes(args);
  const size_t partial_bytes = align_up(
      static_cast<size_t>(partial_base(plan.view, rank_, num_ranks_)) * row_bytes, kBlockAlignment);
  const size_t weight_bytes =
      args.topk_weights == nullptr
          ? 0
          : static_cast<size_t>(plan.num_tokens) * static_cast<size_t>(plan.topk) * sizeof(float);
  Entry entry;
  entry.signature.operation = Operation::kCombine;
  entry.signature.layout = plan.layout;
  entry.signature.dtype = args.dtype;
  entry.signature.topk = plan.topk;
  entry.signature.expert_alignment = plan.expert_alignment;
  entry.signature.row_bytes = static_cast<int32_t>(row_bytes);
  entry.signature.quant = args.quant;
  entry.signature.weighted = args.topk_weights != nullptr;
  entry.signature.by_token = args.by_token;
  entry.signature.plan = static_cast<int32_t>(plan.result.epoch);
  const Allocation piece = allocate(partial_bytes + weight_bytes);
  if (piece.data == nullptr) {
    entry.full = 1;
    entry.needed_bytes = partial_bytes + weight_bytes;
    entry.free_bytes = free_bytes();
  } else {
    entry.rows = offset_of(piece.data);
    entry.weights = entry.rows + partial_bytes;
    // Covered by the release of this entry; read by the ranks that hold this rank's tokens.
    if (weight_bytes != 0) std::memcpy(piece.data + partial_bytes, args.topk_weights, weight_bytes);
  }
  channel_.enter_all(entry, nullptr);
  for (int i = 1; i <= num_ranks_; ++i) {
    const int peer = (rank_ + i) % num_ranks_;
    send_partials(plan, args, peer);
    channel_.signal_done(peer);
  }
  channel_.wait_all_done();
  sum_partials(plan, args, piece.data);
}

// One row per (token, this rank) to the token's owner: the sum over this rank's rows for it.
void CpuTransport::send_partials(const Plan& plan, const CombineArgs& args, int peer) const {
  const Entry& there = channel_.entry(peer);
  const size_t row_bytes =
      static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
  const size_t partial_bytes = partial_row_bytes(args);
  const char* x = static_cast<const char*>(args.x);
  const MetaLayout meta(plan.topk);
  const float* weights = args.topk_weights == nullptr
                             ? nullptr
                             : reinterpret_cast<const float*>(at(peer, there.weights));
  char* out = at(peer, there.rows) +
              static_cast<size_t>(partial_base(plan.view, peer, rank_)) * partial_bytes;
  const int64_t begin = token_base(plan.view, peer, rank_),
                end = begin + received_from(plan.view, peer);
  std::vector<RowTerm> terms;
  for (int64_t n = begin; n < end; ++n, out += partial_bytes) {
    if (args.by_token) {
      copy_row(out, 0, x, n, static_cast<int32_t>(row_bytes));
      continue;
    }
    const int32_t* row = meta.row(plan.view.recv_meta, n);
    const int64_t token = *meta.token(plan.view.recv_meta, n);
    terms.clear();
    for (int k = 0; k < plan.topk; ++k) {
      // Without weights a row counts once, however many slots share it.
      if (row[k] < 0 || (weights == nullptr && std::find(row, row + k, row[k]) != row + k))
        continue;
      terms.push_back({x + static_cast<size_t>(row[k]) * row_bytes,
                       weights == nullptr ? 1.0f : weights[token * plan.topk + k]});
    }
    if (args.quant != Quant::kNone)
      sum_to_fp8_row(args.dtype, terms, weights != nullptr, args.hidden, out);
    else if (weights == nullptr && terms.size() == 1)
      std::memcpy(out, terms[0].row, row_bytes);
    else
      sum_rows(args.dtype, terms, weights != nullptr, out, args.hidden);
  }
}

void CpuTransport::sum_partials(const Plan& plan, const CombineArgs& args,
                                const char* partials) const {
  const size_t row_bytes =
      static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
  std::vector<int64_t> shift(
      static_cast<size_t>(num_ranks_));  // slot at rank r -> partial row here
  for (int r = 0; r < num_ranks_; ++r)
    shift[static_cast<size_t>(r)] =
        int64_t{partial_base(plan.view, rank_, r)} - token_base(plan.view, rank_, r);
  const size_t partial_bytes = partial_row_bytes(args);
  std::vector<const char*> rows;
  std::vector<RowTerm> terms;
  for (int64_t t = 0; t < plan.num_tokens; ++t) {
    rows.clear();
    for (int r = 0; r < num_ranks_; ++r) {
      const int32_t slot = plan.view.slot[t * num_ranks_ + r];
      if (slot < 0) continue;
      const size_t row = static_cast<size_t>(slot + shift[static_cast<size_t>(r)]);
      rows.push_back(partials + row * partial_bytes);
    }
    const size_t at_token = static_cast<size_t>(t) * row_bytes;
    const char* bias =
        args.bias == nullptr ? nullptr : static_cast<const char*>(args.bias) + at_token;
    char* out = static_cast<char*>(args.out) + at_token;
    if (args.quant != Quant::kNone) {
      sum_fp8_rows(args.dtype, rows, bias, out, args.hidden);
      continue;
    }
    terms.clear();
    for (const char* row : rows) terms.push_back({row, 1.0f});
    if (bias != nullptr) terms.push_back({bias, 1.0f});
    sum_rows(args.dtype, terms, false, out, args.hidden);
  }
}

}  // namespace

std::unique_ptr<Transport> make_cpu_transport(const TransportContext& context) {
  return std::make_unique<CpuTransport>(context);
}

}  // namespace epcomm
