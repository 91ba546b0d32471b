// The nccl transport: combine, in its three ways.
#include <vector>

#include "transport/nccl_transport.h"

namespace epcomm {

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
  p.by_token = args.by_token;
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
    for (int r = 0; r < num_ranks_; ++r)
      p.topk_weights[r] =
          reinterpret_cast<const float*>(weights_.get() + bytes * static_cast<size_t>(r));
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
  // A row of floats per slot is shorter than a record, for which a staged row has room too.
  if (!args.by_token) check_fits("x", int64_t{args.hidden} * dtype_bytes(args.dtype), 0);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, Operation::kCombine, stream);
  switch (algorithm(plan)) {
    case NcclAlgorithm::kExact:
      combine_exact(plan, args, stream);
      break;
    case NcclAlgorithm::kAllGather:
      combine_gathered(plan, args, stream);
      break;
    default:
      combine_static(plan, args, stream);
  }
  call.end();
}

void NcclTransport::combine_exact(const Plan& plan, const CombineArgs& args, cudaStream_t stream) {
  const PlanCounts counts{plan.result, num_ranks_, options_.chunks};
  const size_t row =
      static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
  PartialArgs partials = partial_args(plan, args, stream);
  SumArgs sum = sum_args(plan, args);
  // Without weights one row per token is a partial row already, and is sent from where it lies.
  const bool in_place =
      args.by_token || (plan.layout == Layout::kToken && args.topk_weights == nullptr);
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

}  // namespace epcomm
