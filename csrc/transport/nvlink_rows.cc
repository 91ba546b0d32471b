// The nvlink transport: dispatch and combine.
#include <string>

#include "core/call_fields.h"
#include "core/checks.h"
#include "kernels/columns.h"
#include "transport/nvlink_transport.h"

namespace epcomm {
namespace {

// Blocks that bring the link to its limit (docs/nvlink.md); more would only take SMs from others.
constexpr int kDispatchSms = 16;
constexpr int kQuantisingSms = 20;  // where the link waits for arithmetic
constexpr int kCombineSms = 24;
constexpr int kSummingSms = 48;  // where rows are summed before they cross the link

}  // namespace

void NvlinkTransport::dispatch(const Plan& plan, const DispatchArgs& args) {
  if (takes_small_) return dispatch_small(plan, args);
  check();
  check_outputs(plan, args, arena_);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, stream);
  SendArgs send{};
  send.link = link(Operation::kDispatch);
  send.link.token = ++tokens_;
  LinkEntry& entry = send.link.entry;
  describe_dispatch(entry, plan, args, arena_);
  send.dims = dims(plan.topk);
  send.rows = {args.row_bytes, args.scale_bytes};
  send.num_tokens = plan.num_tokens;
  send.x = static_cast<const char*>(args.x);
  send.scales = static_cast<const char*>(args.scales);
  send.quant = args.quant;
  send.x_dtype = args.x_dtype;
  send.hidden = config_.hidden;
  send.global_scale = args.global_scale;
  send.topk_weights = args.topk_weights;
  send.records = !args.replay || args.topk_weights != nullptr;
  send.experts = route_.experts();
  send.plan = plan.view;
  send.room = guessed_room(plan, args);
  send.first_row = plan.layout == Layout::kToken ? plan.view.slot : plan.view.first_row;
  const int sending_sms = args.quant == Quant::kNone ? kDispatchSms : kQuantisingSms;
  send.places = plan.layout != Layout::kToken;
  send.most_senders = sending_sms;
  send.place = route_.place_args(plan, args);
  send.arrivals = layout_.arrivals;
  // As many again copy what arrives to further rows.
  const int usual_sms = send.places ? 2 * sending_sms : sending_sms;
  const int num_sms = args.num_sms > 0 ? args.num_sms : usual_sms;
  // With counts on the host every entry of layout kToken that the caller gets has a token. Cleared
  // before the peers are let in.
  const bool has_room = makes_room(args);
  if (has_room && (plan.layout != Layout::kToken || !plan.host_sync))
    launch_clear_outputs(send.place, stream);
  launch_send(send, num_sms, stream);
  if (args.needed_bytes != 0) {
    call.end();
    wait_entered(send.link.token);
    throw WindowFull(rank_, args.needed_bytes, args.free_bytes);
  }
  if (has_room && !send.places && leaves_slots(entry, args))
    launch_place(send.place, num_sms, stream);
  if (has_room && args.recv_scale_columns != nullptr) make_columns(plan, args, num_sms);
  call.end();
  // The host has waited in this dispatch already, so that it may as well learn of a full window or
  // a mismatch here; the rows are on their way meanwhile.
  if (plan.host_sync && !args.replay && !plan.result.unsettled) wait_entered(send.link.token);
}

// Peers have written rows of scales, and place has copied them to further rows.
void NvlinkTransport::make_columns(const Plan& plan, const DispatchArgs& args, int num_sms) const {
  const int32_t local_experts = experts_.local_experts(rank_);
  ScaleColumnsArgs columns{};
  columns.rows = static_cast<const char*>(args.recv_scales);
  columns.columns = static_cast<char*>(args.recv_scale_columns);
  columns.column_bytes = args.scale_column_bytes;
  columns.units = args.scale_bytes / 4;
  columns.groups = 1;
  columns.group_rows = args.row_capacity;
  columns.counts = plan.view.num_recv;
  if (plan.layout == Layout::kExpert) columns.counts = plan.view.expert_offset + local_experts;
  if (plan.layout == Layout::kPadded) {
    columns.groups = local_experts;
    columns.group_rows = num_ranks_ * config_.max_tokens;
    columns.counts = plan.view.tokens_per_expert;
  }
  launch_scale_columns(columns, num_sms, static_cast<cudaStream_t>(args.stream));
}

void NvlinkTransport::combine(const Plan& plan, const CombineArgs& args) {
  if (takes_small_) return combine_small(plan, args);
  check();
  const int64_t row_bytes = int64_t{args.hidden} * dtype_bytes(args.dtype);
  EPCOMM_CHECK(args.by_token || row_bytes <= int64_t{config_.hidden} * dtype_bytes(config_.dtype),
               "x has " + std::to_string(row_bytes) +
                   " bytes per row; expected at most a row of the Buffer's hidden and dtype");
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, stream);
  PullArgs pull{};
  pull.link = link(Operation::kCombine);
  LinkEntry& entry = pull.link.entry;
  describe_plan(entry, plan);
  entry_field(entry, CallField::kDtype) = static_cast<int32_t>(args.dtype);
  entry_field(entry, CallField::kRowBytes) = static_cast<int32_t>(row_bytes);
  entry_field(entry, CallField::kWeighted) = args.topk_weights != nullptr ? 1 : 0;
  entry_field(entry, CallField::kRows) = args.by_token ? 1 : 0;
  // Where a token has one row and that lies in the window, the owners of the tokens load the rows
  // from where they are. Others are stored to the owners: single rows as they are, several of a
  // token summed here first.
  const bool one_row = args.by_token || plan.layout == Layout::kToken;
  const int usual_sms = one_row ? kCombineSms : kSummingSms;
  const int num_sms = args.num_sms > 0 ? args.num_sms : usual_sms;
  pull.partials = !one_row;
  const bool pushes = one_row && !arena_.contains(args.x, 1);
  if (one_row && !pushes) entry.rows = arena_.offset(args.x);
  entry.pushed = pull.partials || pushes ? 1 : 0;
  if (pull.partials) push_partials(plan, args, pull.link, num_sms);
  if (pushes) pull.own_rows = static_cast<const char*>(args.x);
  pull.push_to = staging_of(row_bytes);
  pull.most_senders = kDispatchSms;
  pull.arrivals = layout_.arrivals;
  pull.dims = dims(plan.topk);
  pull.dtype = args.dtype;
  pull.hidden = args.hidden;
  pull.num_tokens = plan.num_tokens;
  pull.max_tokens = config_.max_tokens;
  pull.staging = window_->peer(rank_) + layout_.staging;
  pull.plan = plan.view;
  pull.topk_weights = args.topk_weights;
  pull.experts = route_.experts();
  pull.bias = args.bias;
  pull.out = args.out;
  launch_pull(pull, num_sms, stream);
  call.end();
}

size_t NvlinkTransport::staging_of(int64_t row_bytes) const {
  return layout_.staging + static_cast<size_t>(rank_) * static_cast<size_t>(config_.max_tokens) *
                               static_cast<size_t>(row_bytes);
}

void NvlinkTransport::push_partials(const Plan& plan, const CombineArgs& args, const LinkArgs& link,
                                    int num_sms) {
  const auto stream = static_cast<cudaStream_t>(args.stream);
  // Before the call is entered: the peers read them.
  if (args.topk_weights != nullptr)
    EPCOMM_CUDA_TRY(cudaMemcpyAsync(
        window_->peer(rank_) + layout_.weights, args.topk_weights,
        static_cast<size_t>(plan.num_tokens) * static_cast<size_t>(plan.topk) * sizeof(float),
        cudaMemcpyDeviceToDevice, stream));
  PartialArgs partials{};
  partials.dims = dims(plan.topk);
  partials.rank = rank_;
  partials.dtype = args.dtype;
  partials.hidden = args.hidden;
  partials.by_token = false;
  partials.chunks = 1;
  partials.x = static_cast<const char*>(args.x);
  partials.row_capacity = most_rows(plan);
  partials.max_tokens = config_.max_tokens;
  partials.plan = plan.view;
  const size_t staging = staging_of(int64_t{args.hidden} * dtype_bytes(args.dtype));
  for (int r = 0; r < num_ranks_; ++r) {
    partials.target[r] = window_->peer(r) + staging;
    if (args.topk_weights != nullptr)
      partials.topk_weights[r] = reinterpret_cast<const float*>(window_->peer(r) + layout_.weights);
  }
  launch_enter(link, stream);
  launch_partials(partials, num_sms, stream);
}

}  // namespace epcomm
