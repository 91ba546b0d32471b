// The nccl transport: dispatch, in its three ways.
#include <vector>

#include "transport/nccl_transport.h"

namespace epcomm {

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
  p.experts = route_.experts();
  p.plan = plan.view;
  return p;
}

void NcclTransport::dispatch(const Plan& plan, const DispatchArgs& args) {
  check_fits("x", args.row_bytes, args.scale_bytes);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Call call(*this, Operation::kDispatch, stream);
  switch (algorithm(plan)) {
    case NcclAlgorithm::kExact:
      dispatch_exact(plan, args, stream);
      break;
    case NcclAlgorithm::kAllGather:
      dispatch_gathered(plan, args, stream);
      break;
    default:
      dispatch_static(plan, args, stream);
  }
  if (statistics_.received_tokens != nullptr)
    launch_count_received(statistics_, plan.view.tokens_per_expert, dims_.local_experts, stream);
  call.end();
}

void NcclTransport::dispatch_exact(const Plan& plan, const DispatchArgs& args,
                                   cudaStream_t stream) {
  const PlanCounts counts{plan.result, num_ranks_, options_.chunks};
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
  PlaceArgs place = route_.place_args(plan, args);
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
  PlaceArgs place = route_.place_args(plan, args);
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
  g.place = route_.place_args(plan, args);
  g.capacity = config_.max_tokens;
  g.announced = plan.view.announced;
  char* send = send_.get();
  char* recv = stage_.get();
  // Each array is padded to max_tokens rows, so that all ranks give the same number of bytes; one
  // rank's rows follow the other's without a gap.
  auto gather = [&](const void* data, size_t row) {
    const size_t bytes = capacity * row;
    EPCOMM_CUDA_TRY(cudaMemcpyAsync(send, data, static_cast<size_t>(plan.num_tokens) * row,
                                    cudaMemcpyDeviceToDevice, stream));
    comm_.all_gather(send, recv, bytes, stream);
    char* gathered = recv;
    send += align_up(bytes, 16);
    recv += align_up(bytes * ranks, 16);
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

}  // namespace epcomm
