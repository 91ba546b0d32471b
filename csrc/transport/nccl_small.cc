// The nccl transport: dispatch of small batches whose counts the host does not know. Nothing is
// exchanged when they are routed; their expert ids go with the rows, as one all-gather.
#include <vector>

#include "kernels/gathered.h"
#include "transport/nccl_transport.h"

namespace epcomm {

RouteResult NcclTransport::route_small(const RouteArgs& args) {
  RouteResult result;
  result.deferred = true;
  result.topk_idx = args.topk_idx;
  result.index_type = args.index_type;
  return result;
}

void NcclTransport::dispatch_small(const Plan& plan, const DispatchArgs& args, const Call& call) {
  const size_t row = align_up(static_cast<size_t>(args.row_bytes + args.scale_bytes), 16);
  SmallDispatchArgs small{};
  small.link.rank = rank_;
  small.link.num_ranks = num_ranks_;
  small.link.window[rank_] = gathered_.get();
  small.small = SmallLayout::gathered(dims_, config_.max_tokens, row);
  small.place = route_.place_args(plan, args);
  small.phase = Phase::kAll;
  small.num_tokens = plan.num_tokens;
  small.expert_alignment = plan.expert_alignment;
  small.fresh = true;
  small.records = true;
  small.topk_idx = plan.result.topk_idx;
  small.index_type = plan.result.index_type;
  small.bad_index = route_.bad_index();
  small.x = static_cast<const char*>(args.x);
  small.scales = static_cast<const char*>(args.scales);
  small.quant = Quant::kNone;
  small.topk_weights = args.topk_weights;
  launch_stage(small, call.begin_mark(), args.num_sms, call.stream());
  exchange_batches(small.small.rows_step, call.stream());
  launch_unstage(small, call.end_mark(), args.num_sms, call.stream());
}

// With room for weights always, so that a rank without them does not leave the others waiting.
void NcclTransport::exchange_batches(size_t block, cudaStream_t stream) {
  auto of = [&](int r) { return gathered_.get() + static_cast<size_t>(r) * block; };
  if (options_.schedule != Schedule::kGrouped && options_.schedule != Schedule::kShifted)
    return comm_.all_gather(of(rank_), gathered_.get(), block, stream);
  std::vector<Message> messages;
  for (int i = 1; i < num_ranks_; ++i) {
    const int peer = (rank_ + i) % num_ranks_;
    messages.push_back({peer, of(rank_), block, of(peer), block});
  }
  comm_.exchange(messages, options_.schedule, stream);
}

}  // namespace epcomm
