// Moves rows between processes of one machine. A row is copied once: from the caller's tensor
// straight into its final place in the tensor that the receiving rank returns, which lies in that
// rank's window.
#include "transport/cpu.h"

#include <cstring>
#include <vector>

#include "core/host_rows.h"
#include "core/quant_rows.h"
#include "transport/host_transport.h"

namespace epcomm {
namespace {

class CpuTransport final : public HostTransport {
 public:
  explicit CpuTransport(const TransportContext& context) : HostTransport(context, false) {}
  void dispatch(const Plan& plan, const DispatchArgs& args) override;
  void combine(const Plan& plan, const CombineArgs& args) override;

 private:
  void send_rows(const Plan& plan, const DispatchArgs& args, int peer);
  void send_partials(const Plan& plan, const CombineArgs& args, int peer);
  void sum_partials(const Plan& plan, const CombineArgs& args, const char* partials) const;
};

void CpuTransport::dispatch(const Plan& plan, const DispatchArgs& args) {
  const Entry entry = dispatch_entry(plan, args);
  channel_.begin(Operation::kDispatch);
  channel_.enter_all(entry, nullptr);
  for (int i = 1; i <= num_ranks_; ++i) {  // own rows last; each rank starts with another peer
    const int peer = (rank_ + i) % num_ranks_;
    send_rows(plan, args, peer);
    channel_.signal_done(peer);
  }
  channel_.wait_all_done();
  place_received(plan, args);
}

void CpuTransport::send_rows(const Plan& plan, const DispatchArgs& args, int peer) {
  for (int64_t t = 0; t < plan.num_tokens; ++t) {
    const int32_t n = plan.view.slot[t * num_ranks_ + peer];
    if (n >= 0) deliver(plan, args, own_token(plan, args, t), peer, n);
  }
}

void CpuTransport::combine(const Plan& plan, const CombineArgs& args) {
  channel_.begin(Operation::kCombine);
  const size_t partial_bytes = align_up(
      static_cast<size_t>(partial_base(plan.view, rank_, num_ranks_)) * partial_row_bytes(args),
      kBlockAlignment);
  const size_t weight_bytes =
      args.topk_weights == nullptr
          ? 0
          : static_cast<size_t>(plan.num_tokens) * static_cast<size_t>(plan.topk) * sizeof(float);
  Entry entry = combine_entry(plan, args);
  const Allocation piece = allocate_for(entry, partial_bytes + weight_bytes);
  if (piece.data != nullptr) {
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
void CpuTransport::send_partials(const Plan& plan, const CombineArgs& args, int peer) {
  const Entry& there = channel_.entry(peer);
  const MetaLayout meta(plan.topk);
  const float* weights = args.topk_weights == nullptr
                             ? nullptr
                             : reinterpret_cast<const float*>(at(peer, there.weights));
  char* out = at(peer, there.rows) +
              static_cast<size_t>(partial_base(plan.view, peer, rank_)) * partial_row_bytes(args);
  const int64_t begin = token_base(plan.view, peer, rank_),
                end = begin + count(plan.view, peer, rank_);
  for (int64_t n = begin; n < end; ++n, out += partial_row_bytes(args)) {
    const int64_t token = *meta.token(plan.view.recv_meta, n);
    write_partial(plan, args, n, weights == nullptr ? nullptr : weights + token * plan.topk, out);
  }
  const auto rows = static_cast<uint64_t>(end - begin);
  LinkTraffic& link = link_to(counters_.combine, peer);
  link.rows += rows;
  link.bytes += rows * partial_row_bytes(args);
  if (weights != nullptr) link.meta_bytes += rows * static_cast<uint64_t>(plan.topk) * 4;
}

void CpuTransport::sum_partials(const Plan& plan, const CombineArgs& args,
                                const char* partials) const {
  const size_t bytes = row_bytes(args);
  std::vector<int64_t> shift(
      static_cast<size_t>(num_ranks_));  // slot at rank r -> partial row here
  for (int r = 0; r < num_ranks_; ++r)
    shift[static_cast<size_t>(r)] =
        int64_t{partial_base(plan.view, rank_, r)} - token_base(plan.view, rank_, r);
  std::vector<const char*> rows;
  std::vector<RowTerm> terms;
  for (int64_t t = 0; t < plan.num_tokens; ++t) {
    rows.clear();
    for (int r = 0; r < num_ranks_; ++r) {
      const int32_t slot = plan.view.slot[t * num_ranks_ + r];
      if (slot < 0) continue;
      const size_t row = static_cast<size_t>(slot + shift[static_cast<size_t>(r)]);
      rows.push_back(partials + row * partial_row_bytes(args));
    }
    const size_t at_token = static_cast<size_t>(t) * bytes;
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
