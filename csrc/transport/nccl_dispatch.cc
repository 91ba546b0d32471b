// The nccl transport: dispatch, in its ways but that of small batches.
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
  make_call(Operation::kDispatch, static_cast<cudaStream_t>(args.stream), [&](const Call& call) {
    switch (algorithm(plan)) {
      case NcclAlgorithm::kExact:
        dispatch_exact(plan, args, call);
        break;
      case NcclAlgorithm::kAllGather:
        dispatch_gathered(plan, args, call);
        break;
      case NcclAlgorithm::kSmall:
        if (plan.result.deferred && !args.replay) {
          dispatch_small(plan, args, call);
          break;
        }
        [[fallthrough]];
      default:
        dispatch_static(plan, args, call);
    }
    if (statistics_.received_tokens != nullptr)
      launch_count_received(statistics_, plan.view.tokens_per_expert, dims_.local_experts,
                            call.stream());
  });
}

PackTarget NcclTransport::ExactRows::at(const PackTarget& region, int64_t n) const {
  const size_t i = static_cast<size_t>(n);
  return {region.x + i * static_cast<size_t>(spec.row_bytes),
          region.scales + i * static_cast<size_t>(spec.scale_bytes), region.meta + i * record};
}

std::vector<Message> NcclTransport::ExactRows::messages(int chunk) const {
  const size_t row = static_cast<size_t>(spec.row_bytes),
               scale = static_cast<size_t>(spec.scale_bytes);
  std::vector<Message> all;
  for (int i = 1; i < counts.num_ranks; ++i) {
    const int peer = (rank + i) % counts.num_ranks;
    const PackTarget from = outgoing(peer, chunk), to = incoming(peer, chunk);
    const size_t out = static_cast<size_t>(counts.chunk(chunk, rank, peer)),
                 in = static_cast<size_t>(counts.chunk(chunk, peer, rank));
    all.push_back({peer, from.x, out * row, to.x, in * row});
    all.push_back({peer, from.scales, out * scale, to.scales, in * scale});
    if (records) all.push_back({peer, from.meta, out * record, to.meta, in * record});
  }
  return all;
}

NcclTransport::ExactRows NcclTransport::exact_rows(const Plan& plan,
                                                   const DispatchArgs& args) const {
  ExactRows rows{};
  rows.counts = {&plan.result, num_ranks_, chunks_};
  rows.rank = rank_;
  rows.spec = {args.row_bytes, args.scale_bytes};
  rows.record = MetaLayout(plan.topk).record_bytes;
  // In a replay the plan has the records already; only weights may be others.
  rows.records = !args.replay || args.topk_weights != nullptr;
  rows.in_place = plan.layout == Layout::kToken;
  const Region send = region(send_.get(), rows.counts.send_base(rank_, num_ranks_), rows.spec);
  const Region recv = region(stage_.get(), plan.result.num_recv_tokens, rows.spec);
  rows.send = {send.x, send.scales, send.meta};
  rows.recv = {recv.x, recv.scales, recv.meta};
  if (rows.in_place) {
    rows.recv.x = static_cast<char*>(args.recv_x);
    rows.recv.scales = static_cast<char*>(args.recv_scales);
  }
  rows.recv.meta = static_cast<char*>(plan.view.recv_meta);
  return rows;
}

// On the caller's stream: chunk 0 is packed, then the exchanges, and the last of placing. Beside
// them, on side_: chunks 1, 2, ... are packed, own rows copied, chunks placed that have arrived.
void NcclTransport::dispatch_exact(const Plan& plan, const DispatchArgs& args, const Call& call) {
  const cudaStream_t stream = call.stream(), side = side_.get();
  const ExactRows rows = exact_rows(plan, args);
  PackArgs pack = pack_args(plan, args);
  PlaceArgs place = route_.place_args(plan, args);
  for (int r = 0; r < num_ranks_; ++r) {
    pack.target[r] = r == rank_ ? rows.incoming(r, 0) : rows.outgoing(r, 0);
    place.source[r] = rows.incoming(r, 0);
    if (rows.in_place) place.source[r].x = place.source[r].scales = nullptr;
  }
  place.clears = !rows.in_place;
  pack.records = rows.records;
  pack.destinations = aside_ ? all() & ~own() : all();
  pack.chunks = chunks_;
  pack.mark = call.begin_mark();
  launch_pack(pack, args.num_sms, stream);
  pack.mark = {};
  if (aside_) EPCOMM_CUDA_TRY(cudaEventRecord(fork_.get(), stream));

  // Launched after the first exchange, so that NCCL's kernel is there first and gets its SMs.
  auto work_aside = [&] {
    EPCOMM_CUDA_TRY(cudaStreamWaitEvent(side, fork_.get(), 0));
    for (pack.chunk = 1; pack.chunk < chunks_; ++pack.chunk) {
      launch_pack(pack, beside(args.num_sms), side);
      EPCOMM_CUDA_TRY(cudaEventRecord(chunk_done_[pack.chunk].get(), side));
    }
    pack.destinations = own();
    pack.chunk = 0;
    pack.chunks = 1;
    launch_pack(pack, beside(args.num_sms), side);
    if (rows.places_early()) launch_place(place, beside(args.num_sms), side);
  };
  for (int c = 0; c < chunks_; ++c) {
    if (c > 0) EPCOMM_CUDA_TRY(cudaStreamWaitEvent(stream, chunk_done_[c].get(), 0));
    comm_.exchange(rows.messages(c), options_.schedule, stream);
    if (c == 0 && aside_) work_aside();
    if (rows.in_place || c == chunks_ - 1) continue;
    order_after(side, stream, chunk_done_[c]);
    place.chunk = c;
    place.chunks = chunks_;
    launch_place(place, beside(args.num_sms), side);
  }
  if (aside_) order_after(stream, side, join_);
  if (aside_ && rows.places_early()) return launch_mark(call.end_mark(), stream);
  if (!rows.in_place) {
    place.chunk = chunks_ - 1;
    place.chunks = chunks_;
  }
  place.mark = call.end_mark();
  launch_place(place, args.num_sms, stream);
}

void NcclTransport::exchange_blocks(size_t block, cudaStream_t stream) {
  auto at = [block](const DeviceMemory& memory, int r) {
    return memory.get() + static_cast<size_t>(r) * block;
  };
  if (options_.schedule == Schedule::kGathered)
    return comm_.all_gather(at(send_, 1 - rank_), stage_.get(), block, stream);
  std::vector<Message> messages;
  for (int i = 1; i < num_ranks_; ++i) {
    const int peer = (rank_ + i) % num_ranks_;
    messages.push_back({peer, at(send_, peer), block, at(stage_, peer), block});
  }
  comm_.exchange(messages, options_.schedule, stream);
}

void NcclTransport::dispatch_static(const Plan& plan, const DispatchArgs& args, const Call& call) {
  const cudaStream_t stream = call.stream();
  const RowSpec spec{args.row_bytes, args.scale_bytes};
  const size_t record = MetaLayout(plan.topk).record_bytes;
  const size_t block = align_up(region_bytes(config_.max_tokens, spec, record), 16);
  PackArgs pack = pack_args(plan, args);
  PlaceArgs place = route_.place_args(plan, args);
  for (int r = 0; r < num_ranks_; ++r) {
    char* from = send_.get() + static_cast<size_t>(r) * block;
    char* to = r == rank_ ? from : stage_.get() + static_cast<size_t>(r) * block;
    const Region out = region(from, config_.max_tokens, spec),
                 in = region(to, config_.max_tokens, spec);
    pack.target[r] = {out.x, out.scales, out.meta};
    place.source[r] = {in.x, in.scales, in.meta};
  }
  pack.mark = call.begin_mark();
  launch_pack(pack, args.num_sms, stream);
  exchange_blocks(block, stream);
  place.clears = true;
  place.mark = call.end_mark();
  launch_place(place, args.num_sms, stream);
}

void NcclTransport::dispatch_gathered(const Plan& plan, const DispatchArgs& args,
                                      const Call& call) {
  const cudaStream_t stream = call.stream();
  const size_t capacity = static_cast<size_t>(config_.max_tokens),
               ranks = static_cast<size_t>(num_ranks_);
  GatheredArgs g{};
  g.place = route_.place_args(plan, args);
  g.place.clears = true;
  g.place.mark = call.end_mark();
  g.capacity = config_.max_tokens;
  g.announced = plan.view.announced;
  launch_mark(call.begin_mark(), stream);
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
  launch_place_gathered(g, args.num_sms, stream);
}

}  // namespace epcomm
