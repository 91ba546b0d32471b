// Pack: copies the rows, scales and metadata records of one chunk of a batch to where the tokens of
// each destination rank are collected.
//
// Buffers: x, scales [T, bytes], plan.topk_idx, row [T, K], plan.slot [T, R], plan.rank_count [R,
// R] and topk_weights [T, K] are read; target[r] is written at the tokens of the chunk that go to
// r. Launch: one block per SM; a warp takes a part of a row, reads it once and stores it to every
// destination.
// Memory order: none between threads, each byte is written by one. What follows on the stream sees
// it; a target in memory of a peer is released by whoever signals that peer, after this kernel.
#include "kernels/device.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/mark.cuh"
#include "kernels/rows.cuh"

namespace epcomm {
namespace {

static_assert(sizeof(PackArgs) <= kMaxKernelArgs);

// The record of token t at each rank that it goes to, and its scales.
__device__ __forceinline__ void pack_metadata(const PackArgs& args, int64_t t,
                                              const TokenRanks& token_ranks, uint64_t ranks) {
  const MetaLayout meta(args.dims.topk);
  const int lane = lane_index(), topk = args.dims.topk;
  const bool weighted = args.topk_weights != nullptr;
  TokenSlots slots;
  slots.token = static_cast<int32_t>(t);
  int owner = -1;
  int32_t row = -1;
  if (lane < topk) {
    slots.expert = args.plan.topk_idx[t * topk + lane];
    row = args.plan.row[t * topk + lane];
    if (weighted) slots.weight = args.topk_weights[t * topk + lane];
    if (slots.expert >= 0) owner = args.experts.rank[slots.expert];
  }
  while (ranks != 0) {
    const int r = take_lowest(ranks);
    const int64_t i = token_ranks.index(r);
    slots.row = owner == r ? row : -1;
    if (args.records) write_record(meta, meta.row(args.target[r].meta, i), slots, weighted);
    if (args.rows.scale_bytes != 0)
      copy_bytes(args.target[r].scales + i * args.rows.scale_bytes,
                 args.scales + t * args.rows.scale_bytes, args.rows.scale_bytes);
  }
}

__global__ void __launch_bounds__(kRowThreads, 1)
    pack_kernel(const __grid_constant__ PackArgs args) {
  EPCOMM_SHARED(int32_t[kMaxPackRanks], sent_before);
  make_mark(args.mark);
  const int num_ranks = args.dims.num_ranks, lane = lane_index();
  count_sent_before(sent_before, args.plan.rank_count, num_ranks, args.rank);

  const int64_t begin = chunk_begin(args.num_tokens, args.chunks, args.chunk);
  const int64_t end = chunk_begin(args.num_tokens, args.chunks, args.chunk + 1);
  const int64_t row_bytes = args.rows.row_bytes;
  const RowJobs jobs(static_cast<int>(end - begin), args.rows.row_bytes);
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int64_t t = begin + job.row;
    const char* from = args.x + t * row_bytes;
    int v = job.begin + lane;
    // The row is on its way before its destinations are known: nearly every token has one.
    Batch batch;
    batch.load(from, v, job.end);
    const TokenRanks token_ranks(args.plan.slot + t * num_ranks, sent_before, num_ranks);
    const uint64_t ranks = token_ranks.ranks() & args.destinations;
    for (int at = job.begin; at < job.end; at += Batch::kStep) {
      for (uint64_t rest = ranks; rest != 0;) {
        const int r = take_lowest(rest);
        batch.store(args.target[r].x + token_ranks.index(r) * row_bytes, v, job.end);
      }
      v += Batch::kStep;
      batch.load(from, v, job.end);
    }
    if (job.leads) pack_metadata(args, t, token_ranks, ranks);
  }
}

}  // namespace

void launch_pack(const PackArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.x, "x");
  if (chunk_begin(args.num_tokens, args.chunks, args.chunk) ==
      chunk_begin(args.num_tokens, args.chunks, args.chunk + 1)) {
    launch_mark(args.mark, stream);
    return;
  }
  launch("launch of pack", pack_kernel, {persistent_blocks(num_sms), kRowThreads}, stream, args);
}

}  // namespace epcomm
