// Small batches: one kernel per call (kernels/small.h).
#include <string>

#include "core/call_fields.h"
#include "core/checks.h"
#include "epcomm/small_batches.h"
#include "kernels/quant.h"
#include "transport/gpu_link_transport.h"

namespace epcomm {

std::string why_not_small_batches(int num_ranks, int num_experts, int max_tokens) {
  if (num_ranks > kMaxLinkRanks)
    return "this group has " + std::to_string(num_ranks) + " ranks; expected at most " +
           std::to_string(kMaxLinkRanks);
  if (max_tokens > kTileTokens)
    return "max_tokens is " + std::to_string(max_tokens) + "; expected at most " +
           std::to_string(kTileTokens);
  Dims dims{};
  dims.num_ranks = num_ranks;
  dims.num_experts = num_experts;
  const size_t needed = small_shared_bytes(dims, max_tokens);
  if (needed > kMaxSmallShared)
    return "routing " + std::to_string(num_ranks) + " ranks and " + std::to_string(num_experts) +
           " experts in one block needs " + std::to_string(needed) +
           " bytes of shared memory; there are " + std::to_string(kMaxSmallShared);
  return "";
}

std::string why_not_small(const TransportContext& context) {
  const Config& config = context.options.config;
  return why_not_small_batches(context.bootstrap.size(), config.num_experts, config.max_tokens);
}

// Kernels of both halves use the same epoch, so nothing else may run between them.
void GpuLinkTransport::check_phase(Phase phase, Operation operation) {
  if (phase != Phase::kReceive) {
    EPCOMM_CHECK(!half_, std::string("the receive half of the last ") + operation_name(*half_) +
                             " was not called; call it first");
    return;
  }
  EPCOMM_CHECK(half_ == operation, std::string("the receive half of a ") +
                                       operation_name(operation) +
                                       " was called, but its send half was not");
}

void GpuLinkTransport::check_fits_slot(int64_t row_bytes, int64_t scale_bytes) const {
  EPCOMM_CHECK(
      fits_slot(row_bytes, scale_bytes),
      "x has " + std::to_string(row_bytes) + " bytes per row and " + std::to_string(scale_bytes) +
          " of scales; expected at most " + std::to_string(small_.row_bytes) +
          " together, a row of the Buffer's hidden and dtype; make the Buffer with a wider dtype" +
          too_wide_advice());
}

// Nothing is exchanged yet: expert ids go out with the rows.
RouteResult GpuLinkTransport::route_small(const RouteArgs& args) {
  expect_settle(args.ahead);
  unsettled_ = args;
  RouteResult result;
  result.epoch = ++routes_;
  result.unsettled = args.ahead;
  result.deferred = true;
  result.topk_idx = args.topk_idx;
  result.index_type = args.index_type;
  return result;
}

// A batch that was sent ahead of its counts is not sent again for want of room.
void GpuLinkTransport::check_most_room(const Plan& plan, const DispatchArgs& args) const {
  const int64_t tokens = int64_t{num_ranks_} * config_.max_tokens;
  const int64_t rows = most_rows(plan);
  EPCOMM_CHECK(args.recv_capacity >= tokens && args.row_capacity >= rows,
               "recv_capacity and row_capacity are " + std::to_string(args.recv_capacity) +
                   " and " + std::to_string(args.row_capacity) +
                   "; a small batch that is sent ahead of its counts needs room for the most that "
                   "can be received: " +
                   std::to_string(tokens) + " tokens in " + std::to_string(rows) + " rows");
  EPCOMM_CHECK(args.phase == Phase::kAll,
               "phase is one half of a call; a small batch that is sent ahead of its counts is "
               "dispatched in one");
}

void GpuLinkTransport::dispatch_small(const Plan& plan, const DispatchArgs& args) {
  const bool receives = args.phase == Phase::kReceive;
  // A receive half that were refused here would leave this rank behind the others.
  if (receives)
    watchdog_.check();
  else
    check();
  check_phase(args.phase, Operation::kDispatch);
  check_fits_slot(args.row_bytes, args.scale_bytes);
  const bool settles = plan.result.unsettled;
  if (args.needed_bytes == 0) check_capacity(plan, args);
  if (settles) check_most_room(plan, args);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, stream);
  const bool waits = args.phase == Phase::kAll && !settles &&
                     (args.needed_bytes != 0 || (plan.host_sync && !args.replay));
  SmallDispatchArgs small{};
  small.link = link(Operation::kDispatch);
  small.small = small_;
  small.place = route_.place_args(plan, args);
  if (args.recv_scale_columns != nullptr) {
    small.place.recv_scales = static_cast<char*>(args.recv_scale_columns);
    small.place.scale_column_bytes = args.scale_column_bytes;
    small.place.group_rows =
        plan.layout == Layout::kPadded ? num_ranks_ * config_.max_tokens : INT32_MAX;
  }
  if (waits || settles) small.link.token = ++tokens_;
  LinkEntry& entry = small.link.entry;
  describe_rows(entry, plan, args);
  entry.num_tokens = plan.num_tokens;
  small.phase = args.phase;
  small.num_tokens = plan.num_tokens;
  small.expert_alignment = plan.expert_alignment;
  small.fresh = plan.result.deferred && !args.replay;
  small.records = !args.replay || args.topk_weights != nullptr;
  small.topk_idx = plan.result.topk_idx;
  small.index_type = plan.result.index_type;
  small.bad_index = plan.host_sync ? nullptr : route_.bad_index();
  small.totals = settles ? route_.totals() : nullptr;
  small.x = static_cast<const char*>(args.x);
  small.scales = static_cast<const char*>(args.scales);
  small.quant = args.quant;
  small.x_dtype = args.x_dtype;
  small.hidden = config_.hidden;
  small.global_scale = args.global_scale;
  small.topk_weights = args.topk_weights;
  kernels_.dispatch(small, args.num_sms, stream);
  half_ = args.phase == Phase::kSend ? std::optional(Operation::kDispatch) : std::nullopt;
  call.end();
  // As in larger dispatches the host learns of a mismatch here if it has waited anyway.
  if (waits) wait_entered(small.link.token);
  if (args.needed_bytes != 0) throw WindowFull(rank_, args.needed_bytes, args.free_bytes);
}

void GpuLinkTransport::combine_small(const Plan& plan, const CombineArgs& args) {
  const bool receives = args.phase == Phase::kReceive;
  if (receives)
    watchdog_.check();
  else
    check();
  check_phase(args.phase, Operation::kCombine);
  const int64_t row_bytes = args.quant == Quant::kFp8
                                ? static_cast<int64_t>(fp8_row_bytes(args.hidden))
                                : int64_t{args.hidden} * dtype_bytes(args.dtype);
  check_fits_slot(row_bytes, 0);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, stream);
  SmallCombineArgs small{};
  small.link = link(Operation::kCombine);
  small.small = small_;
  LinkEntry& entry = small.link.entry;
  describe_plan(entry, plan);
  entry_field(entry, CallField::kDtype) = static_cast<int32_t>(args.dtype);
  entry_field(entry, CallField::kRowBytes) = static_cast<int32_t>(row_bytes);
  entry_field(entry, CallField::kQuant) = static_cast<int32_t>(args.quant);
  entry_field(entry, CallField::kWeighted) = args.topk_weights != nullptr ? 1 : 0;
  entry_field(entry, CallField::kRows) = args.by_token ? 1 : 0;
  small.dims = dims(plan.topk);
  small.dtype = args.dtype;
  small.quant = args.quant;
  small.phase = args.phase;
  small.hidden = args.hidden;
  small.num_tokens = plan.num_tokens;
  small.by_token = args.by_token;
  small.plan = plan.view;
  small.x = static_cast<const char*>(args.x);
  small.topk_weights = args.topk_weights;
  small.bias = args.bias;
  small.out = args.out;
  kernels_.combine(small, args.num_sms, stream);
  half_ = args.phase == Phase::kSend ? std::optional(Operation::kCombine) : std::nullopt;
  call.end();
}

}  // namespace epcomm
