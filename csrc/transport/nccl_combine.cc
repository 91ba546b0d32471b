// The nccl transport: combine, in its three ways.
#include <vector>

#include "core/recv_rows.h"
#include "transport/nccl_transport.h"

namespace epcomm {

PartialArgs NcclTransport::partial_args(const Plan& plan, const CombineArgs& args,
                                        const Call& call) {
  PartialArgs p{};
  p.dims = dims_;
  p.dims.topk = plan.topk;
  p.rank = rank_;
  p.dtype = args.dtype;
  p.hidden = args.hidden;
  p.chunk = 0;
  p.chunks = 1;
  p.by_token = args.by_token;
  p.x = static_cast<const char*>(args.x);
  p.row_capacity = static_cast<int32_t>(
      most_recv_rows(plan.layout, int64_t{num_ranks_} * config_.max_tokens, plan.topk,
                     experts_.local_experts(rank_), plan.expert_alignment));
  p.max_tokens = config_.max_tokens;
  p.plan = plan.view;
  p.mark = call.begin_mark();
  if (args.topk_weights != nullptr) {
    // The sums are made where the rows are, so every rank needs the weights of all tokens: few
    // bytes.
    launch_mark(p.mark, call.stream());
    p.mark = {};
    const size_t bytes =
        static_cast<size_t>(config_.max_tokens) * static_cast<size_t>(plan.topk) * sizeof(float);
    char* mine = weights_.get() + bytes * static_cast<size_t>(num_ranks_);
    EPCOMM_CUDA_TRY(cudaMemcpyAsync(
        mine, args.topk_weights,
        static_cast<size_t>(plan.num_tokens) * static_cast<size_t>(plan.topk) * sizeof(float),
        cudaMemcpyDeviceToDevice, call.stream()));
    comm_.all_gather(mine, weights_.get(), bytes, call.stream());
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
  make_call(Operation::kCombine, static_cast<cudaStream_t>(args.stream), [&](const Call& call) {
    switch (algorithm(plan)) {
      case NcclAlgorithm::kExact:
        combine_exact(plan, args, call);
        break;
      case NcclAlgorithm::kAllGather:
        combine_gathered(plan, args, call);
        break;
      default:
        combine_static(plan, args, call);
    }
  });
}

std::vector<Message> NcclTransport::ExactPartials::messages(int chunk) const {
  std::vector<Message> all;
  for (int i = 1; i < counts.num_ranks; ++i) {
    const int peer = (rank + i) % counts.num_ranks;
    all.push_back({peer, at(whole ? x : staged, peer, chunk),
                   static_cast<size_t>(counts.chunk(chunk, peer, rank)) * row,
                   incoming(peer, chunk),
                   static_cast<size_t>(counts.chunk(chunk, rank, peer)) * row});
  }
  return all;
}

NcclTransport::ExactPartials NcclTransport::exact_partials(const Plan& plan,
                                                           const CombineArgs& args) const {
  ExactPartials p{};
  p.counts = {&plan.result, num_ranks_, chunks_};
  p.rank = rank_;
  p.row = static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
  p.whole = args.by_token || (plan.layout == Layout::kToken && args.topk_weights == nullptr);
  p.x = static_cast<char*>(const_cast<void*>(args.x));
  p.staged = send_.get();
  p.arrived = stage_.get();
  return p;
}

// Launched after the first exchange, so that NCCL's kernel is there first and gets its SMs.
void NcclTransport::partials_aside(const ExactPartials& rows, PartialArgs& partials, int num_sms) {
  EPCOMM_CUDA_TRY(cudaStreamWaitEvent(side_.get(), fork_.get(), 0));
  for (int i = 1; i < chunks_ && !rows.whole; ++i) {
    partials.chunk = rows.chunk(i);
    launch_partials(partials, beside(num_sms), side_.get());
    EPCOMM_CUDA_TRY(cudaEventRecord(chunk_done_[partials.chunk].get(), side_.get()));
  }
  partials.sources = own();
  partials.chunk = 0;
  partials.chunks = 1;
  if (!rows.whole) launch_partials(partials, beside(num_sms), side_.get());
  EPCOMM_CUDA_TRY(cudaEventRecord(own_done_.get(), side_.get()));
}

// On the caller's stream: the partials of the first chunk, the exchanges, the last sum. Beside
// them, on side_: the partials of the other chunks and of own tokens, the sums of chunks that are
// there.
void NcclTransport::combine_exact(const Plan& plan, const CombineArgs& args, const Call& call) {
  const cudaStream_t stream = call.stream(), side = side_.get();
  const ExactPartials rows = exact_partials(plan, args);
  PartialArgs partials = partial_args(plan, args, call);
  SumArgs sum = sum_args(plan, args);
  for (int r = 0; r < num_ranks_; ++r) {
    partials.target[r] = rows.at(rows.staged, r, 0);
    sum.partial[r] =
        r != rank_ ? rows.incoming(r, 0) : rows.at(rows.whole ? rows.x : rows.staged, r, 0);
  }
  partials.chunks = sum.chunks = chunks_;
  if (rows.whole) {
    launch_mark(partials.mark, stream);
  } else {
    partials.sources = aside_ ? all() & ~own() : all();
    partials.chunk = rows.chunk(0);
    launch_partials(partials, args.num_sms, stream);
  }
  partials.mark = {};
  if (aside_) EPCOMM_CUDA_TRY(cudaEventRecord(fork_.get(), stream));
  for (int i = 0; i < chunks_; ++i) {
    sum.chunk = rows.chunk(i);
    if (i > 0 && !rows.whole)
      EPCOMM_CUDA_TRY(cudaStreamWaitEvent(stream, chunk_done_[sum.chunk].get(), 0));
    comm_.exchange(rows.messages(sum.chunk), options_.schedule, stream);
    if (i == 0 && aside_) partials_aside(rows, partials, args.num_sms);
    if (i == chunks_ - 1) break;
    order_after(side, stream, chunk_done_[sum.chunk]);
    launch_sum(sum, beside(args.num_sms), side);
  }
  if (aside_) EPCOMM_CUDA_TRY(cudaStreamWaitEvent(stream, own_done_.get(), 0));
  sum.mark = call.end_mark();
  launch_sum(sum, args.num_sms, stream);
  if (aside_) order_after(stream, side, join_);
}

void NcclTransport::combine_static(const Plan& plan, const CombineArgs& args, const Call& call) {
  const cudaStream_t stream = call.stream();
  const size_t row =
      static_cast<size_t>(args.hidden) * static_cast<size_t>(dtype_bytes(args.dtype));
  const size_t block = static_cast<size_t>(config_.max_tokens) * row;
  PartialArgs partials = partial_args(plan, args, call);
  SumArgs sum = sum_args(plan, args);
  for (int r = 0; r < num_ranks_; ++r) {
    const size_t at = static_cast<size_t>(r) * block;
    partials.target[r] = send_.get() + at;
    sum.partial[r] = (r == rank_ ? send_ : stage_).get() + at;
  }
  launch_partials(partials, args.num_sms, stream);
  exchange_blocks(block, stream);
  sum.mark = call.end_mark();
  launch_sum(sum, args.num_sms, stream);
}

void NcclTransport::combine_gathered(const Plan& plan, const CombineArgs& args, const Call& call) {
  const cudaStream_t stream = call.stream();
  const size_t count = static_cast<size_t>(config_.max_tokens) * static_cast<size_t>(args.hidden);
  const PartialArgs partials = partial_args(plan, args, call);
  EPCOMM_CUDA_TRY(cudaMemsetAsync(send_.get(), 0,
                                  static_cast<size_t>(num_ranks_) * count * sizeof(float), stream));
  launch_dense_partials(partials, send_.as<float>(), config_.max_tokens, args.num_sms, stream);
  comm_.reduce_scatter(send_.as<float>(), stage_.as<float>(), count, stream);
  launch_finish(stage_.as<float>(), args.bias, args.out, args.dtype,
                int64_t{plan.num_tokens} * args.hidden, stream);
  launch_mark(call.end_mark(), stream);
}

}  // namespace epcomm
