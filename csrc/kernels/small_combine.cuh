// Combine of a small batch, in one kernel: the ranks that have a token's rows add them up and store
// one partial row into the window of the token's owner, which sums the partial rows of all ranks.
//
// Does, block by block:
//   1. Block 0 sends the weights of this rank's tokens, if there are any, to all ranks, with the
//      entry of the call. With weights all blocks then wait for those of the others.
//   2. Partial rows: those of the block's shares of every source's tokens, as fp8 if asked, then
//      their signals.
//   3. Waits for the entries of all ranks. Sums each of this rank's tokens when its partial rows
//      have arrived, in the order of ranks, then adds the bias.
// The send half is 1 and 2, the receive half 3.
//
// Buffers: x, plan.recv_meta, plan.rank_count, topk_weights, plan.slot, bias are read. In the
// window of a token's owner, at SmallLayout of this rank and epoch: weights, rows. From this rank's
// window, of all ranks: the same. out is written.
// Launch: num_sms blocks of 512 threads, one per SM, all at the same time (a cooperative launch):
// blocks wait for other blocks, of this rank, too. Sending, warps share the rows of their block;
// summing, all warps of the grid share all tokens, cut into parts.
// Memory order: weights are released by `entered` (kernels/link.cuh), partial rows by the signals
// of their shares (kernels/small.cuh).
#pragma once

#include "kernels/device.cuh"
#include "kernels/elements.cuh"
#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/partials.cuh"
#include "kernels/small.cuh"
#include "kernels/small.h"
#include "kernels/small_quant.cuh"

namespace epcomm {
namespace {

static_assert(sizeof(SmallCombineArgs) <= kMaxKernelArgs);

// By block 0: weights to all ranks, then the entry.
template <class Link>
__device__ __forceinline__ void announce(const SmallCombineArgs& args, uint64_t epoch) {
  const LinkArgs& link = args.link;
  if (args.topk_weights != nullptr) {
    const int slots = args.num_tokens * args.dims.topk;
    for (int i = thread_index(); i < slots; i += kSmallThreads) {
      const float weight = args.topk_weights[i];
      for (int r = 0; r < (Link::kMapped ? link.num_ranks : 1); ++r)
        reinterpret_cast<float*>(link.window[(link.rank + r) % link.num_ranks] +
                                 args.small.source_weights(link.rank, epoch))[i] = weight;
    }
  }
  __syncthreads();  // the entry's signal releases what all threads have stored
  const LinkPieces pieces = {
      {same_place(args.small.source_weights(link.rank, epoch),
                  static_cast<size_t>(args.num_tokens * args.dims.topk) * sizeof(float)),
       {}},
      args.topk_weights != nullptr ? 1 : 0};
  link_announce<Link>(link, epoch, nullptr, 0, pieces);
}

// Tokens of source s that this rank has received.
__device__ __forceinline__ int32_t received_from(const SmallCombineArgs& args, int s) {
  return args.plan.rank_count[s * args.dims.num_ranks + args.link.rank];
}

// A job's part of a partial row, as kFp8. staged: kStagedScaleBytes of shared memory.
template <Dtype kDtype>
__device__ __forceinline__ void store_fp8(const SmallCombineArgs& args, const PartialToken& token,
                                          const RowJob& job, char* staged, char* to) {
  const int row_bytes = args.hidden * kElementBytes<kDtype>;
  const auto range = ScaleRange::of<Quant::kFp8, kDtype>(
      job, row_bytes / kVectorBytes, make_quant_layout(Quant::kFp8, args.hidden));
  for (int at = job.begin; at < job.end; at += Batch::kStep) {
    const int v = at + lane_index();
    Batch batch{};  // beyond the end of the row
    Sum<kDtype> sum;
    sum.clear();
    add_rows(args.x, row_bytes, token, v, job.end, batch, sum);
    store_sum_fp8(sum, to, staged - range.begin, v, job.end);
  }
  __syncwarp();
  copy_bytes(to + args.hidden + range.begin, staged, range.bytes);
  __syncwarp();  // before the scales of the next job
}

template <class Link, Quant kQuant, Dtype kDtype>
__device__ __forceinline__ void send_partials(const SmallCombineArgs& args, uint64_t epoch) {
  EPCOMM_SHARED(SourceRanges, ranges);
  const LinkArgs& link = args.link;
  const int num_ranks = args.dims.num_ranks, topk = args.dims.topk;
  constexpr bool kFp8 = kQuant == Quant::kFp8;
  const int row_bytes = args.hidden * kElementBytes<kDtype>;
  const auto sent_bytes =
      static_cast<uint32_t>(kFp8 ? fp8_row_bytes(args.hidden) : static_cast<size_t>(row_bytes));
  // Lines up what this block sends to each source.
  ranges.fill(num_ranks, [&](int s) {
    const int32_t total = received_from(args, s);
    return SourceCount{0, BlockRows(total).count, total};
  });
  const MetaLayout meta(topk);
  const BlockRows own(0);
  int least_parts = 1;
  if constexpr (kFp8) least_parts = least_quant_parts<kQuant, kDtype>(row_bytes / kVectorBytes);
  const BlockJobs jobs(ranges.end[num_ranks - 1], row_bytes, least_parts);
  // The record of the i-th token received from rank s.
  auto record_of = [&](int s, int i) {
    const int32_t before = ranges.to_recv[s] - ranges.to_source[s];  // tokens of lower ranks
    return meta.row(args.plan.recv_meta, before + i);
  };
  // Its partial row, here and at the token's owner.
  auto piece = [&](int s, int i) -> LinkPiece {
    const int t = *meta.token(record_of(s, i), 0);
    if (t < 0 || t >= args.small.max_tokens) return {};
    const size_t to = args.small.row(link.rank, epoch, t);
    const bool there = Link::kMapped || s == link.rank;
    return {there ? to : args.small.outbox_row(s, i), to, sent_bytes};
  };
  for (int j = warp_index(); j < jobs.jobs; j += kSmallWarps) {
    const RowJob job = jobs.at(j);
    const int s = ranges.source(job.row, num_ranks);
    const int i = own.at(job.row + ranges.to_source[s]);
    void* record = record_of(s, i);
    const LinkPiece place = piece(s, i);
    if (place.bytes == 0) continue;
    const int t = *meta.token(record, 0);
    const float* weights = nullptr;
    if (args.topk_weights != nullptr)
      weights = reinterpret_cast<const float*>(link.window[link.rank] +
                                               args.small.source_weights(s, epoch)) +
                t * topk;
    const int32_t n = ranges.to_recv[s] - ranges.to_source[s] + i;
    const PartialToken token(meta, record, weights, args.by_token ? n : -1);
    char* to = link.window[Link::kMapped ? s : link.rank] + place.from;
    if constexpr (kFp8) {
      store_fp8<kDtype>(args, token, job, dynamic_shared() + warp_index() * kStagedScaleBytes, to);
    } else {
      for (int at = job.begin; at < job.end; at += Batch::kStep) {
        const int v = at + lane_index();
        Batch batch;
        sum_rows<kDtype>(args.x, row_bytes, token, v, job.end, batch);
        batch.store(to, v, job.end);
      }
    }
  }
  signal_shares<Link>(
      link, args.small, epoch, [&](int s) { return received_from(args, s); }, piece);
}

// The tokens of this rank, by all warps of the grid.
template <class Link, Quant kQuant, Dtype kDtype>
__device__ __forceinline__ void sum_partials(const SmallCombineArgs& args, uint64_t epoch) {
  EPCOMM_SHARED(int32_t[kMaxPackRanks], sent_before);
  const LinkArgs& link = args.link;
  const int num_ranks = args.dims.num_ranks, lane = lane_index();
  count_sent_before(sent_before, args.plan.rank_count, num_ranks, link.rank);
  const int64_t row_bytes = int64_t{args.hidden} * kElementBytes<kDtype>;
  const char* window = link.window[link.rank];
  const char* bias = static_cast<const char*>(args.bias);
  char* out = static_cast<char*>(args.out);
  const RowJobs jobs(args.num_tokens, static_cast<int>(row_bytes));
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int64_t t = job.row;
    const TokenRanks at_rank(args.plan.slot + t * num_ranks, sent_before, num_ranks);
    // A share counts the rows that one rank sends to this one: lane r waits for rank r.
    if (!rows_arrived<Link>(link, args.small, epoch, lane, at_rank.low)) return;
    for (int at = job.begin; at < job.end; at += Batch::kStep) {
      const int v = at + lane;
      Batch batch;
      Sum<kDtype> sum;
      sum.clear();
      for (uint64_t rest = at_rank.ranks(); rest != 0;) {
        const char* row = window + args.small.row(take_lowest(rest), epoch, t);
        if constexpr (kQuant == Quant::kFp8) {
          ArrivedFp8<kDtype> arrived;
          arrived.load(row, args.hidden, v, job.end);
          arrived.add_to(sum);
        } else {
          batch.load<RowMemory::kArrived>(row, v, job.end);
          sum.add(batch);
        }
      }
      if (bias != nullptr) {
        batch.load(bias + t * row_bytes, v, job.end);
        sum.add(batch);
      }
      sum.round_to(batch);
      batch.store(out + t * row_bytes, v, job.end);
    }
  }
}

template <class Link, Quant kQuant, Dtype kDtype>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_combine_kernel(const __grid_constant__ SmallCombineArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  const LinkArgs& link = args.link;
  const bool weighted = args.topk_weights != nullptr, marks = blockIdx.x == 0;
  bool going = link_begin(link, call);
  if (going && args.phase != Phase::kReceive) {
    if (blockIdx.x == 0) announce<Link>(args, call.epoch);
    if (weighted) {
      if (marks && thread_index() == 0) link_mark_begun(link);
      going = link_agree<Link>(link, call, args.phase == Phase::kAll, 1);
    }
    if (going) send_partials<Link, kQuant, kDtype>(args, call.epoch);
  }
  if (args.phase == Phase::kSend) return;
  const bool waited = weighted && args.phase == Phase::kAll;
  if (going && !waited) {
    if (marks && !weighted && thread_index() == 0) link_mark_begun(link);
    going = link_agree<Link>(link, call, true, weighted ? 1 : 0);
  }
  if (going) sum_partials<Link, kQuant, kDtype>(args, call.epoch);
  link_leave<Link>(link, call, going);
}

template <class Link, Quant kQuant>
auto combine_kernel(Dtype dtype) {
  return for_dtype(dtype, small_combine_kernel<Link, kQuant, Dtype::kBfloat16>,
                   small_combine_kernel<Link, kQuant, Dtype::kFloat16>,
                   small_combine_kernel<Link, kQuant, Dtype::kFloat32>);
}

}  // namespace

template <class Link>
void launch_small_combine(const SmallCombineArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.x, "x");
  check_aligned(args.bias, "bias");
  check_aligned(args.out, "out");
  const bool fp8 = args.quant == Quant::kFp8;
  const size_t staged = fp8 ? size_t{kSmallWarps} * kStagedScaleBytes : 0;
  launch("launch of small_combine",
         fp8 ? combine_kernel<Link, Quant::kFp8>(args.dtype)
             : combine_kernel<Link, Quant::kNone>(args.dtype),
         {persistent_blocks(num_sms), kSmallThreads, staged, true}, stream, args);
}

}  // namespace epcomm
