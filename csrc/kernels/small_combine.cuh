// Combine of a small batch, in one kernel: the ranks that have a token's rows add them up and store
// one partial row into the window of the token's owner, which sums the partial rows of all ranks.
//
// Blocks that send (kernels/small.cuh):
//   1. Block 0 sends the weights of this rank's tokens, if there are any, to all ranks, with the
//      entry of the call. With weights all of them then wait for those of the others.
//   2. Partial rows: those of the block's shares of every source's tokens, as fp8 if asked, then
//      their signals.
// Blocks that receive:
//   3. Wait for the entries of all ranks. Sum each of this rank's tokens when its partial rows have
//      arrived, in the order of ranks, then add the bias.
// The send half is 1 and 2, the receive half 3.
//
// Buffers: x, plan.recv_meta, plan.rank_count, topk_weights, plan.slot, bias are read. In the
// window of a token's owner, at SmallLayout of this rank and epoch: weights, rows. From this rank's
// window, of all ranks: the same; the rows are unwritten afterwards. out is written.
// Launch: num_sms blocks of 512 threads, one per SM, all of which must find room at some time:
// blocks wait for other blocks, of this rank, too. Sending, warps share the rows of their block;
// summing, all warps that receive share all tokens, cut into parts.
// Memory order: weights are words that carry the epoch, partial rows are taken as
// kernels/small_staging.cuh says. Where the link puts, weights are released by `entered`
// (kernels/link.cuh), partial rows by their signals.
#pragma once

#include <type_traits>

#include "kernels/device.cuh"
#include "kernels/elements.cuh"
#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/partials.cuh"
#include "kernels/small.cuh"
#include "kernels/small.h"
#include "kernels/small_quant.cuh"
#include "kernels/small_staging.cuh"

namespace epcomm {
namespace {

static_assert(sizeof(SmallCombineArgs) <= kMaxKernelArgs);

// By block 0: weights to all ranks, then the entry.
template <class Link>
__device__ __forceinline__ void announce(const SmallCombineArgs& args, uint64_t epoch) {
  const LinkArgs& link = args.link;
  const int slots = args.num_tokens * args.dims.topk;
  if (args.topk_weights != nullptr) {
    for (int i = thread_index(); i < slots; i += kSmallThreads) {
      const float weight = args.topk_weights[i];
      if constexpr (kPuts<Link>) {
        auto* words = link.window[link.rank] + link.control.slots(link.rank, epoch);
        reinterpret_cast<uint64_t*>(words)[i] = SlotWord::of(0, __float_as_uint(weight));
      } else {
        for (int r = 0; r < link.num_ranks; ++r)
          store_tagged(link.window[(link.rank + r) % link.num_ranks] +
                           args.small.source_weights(link.rank, epoch),
                       i, epoch, __float_as_uint(weight));
      }
    }
  }
  __syncthreads();
  link_announce<Link>(
      link, epoch, nullptr, 0, {},
      args.topk_weights != nullptr ? static_cast<size_t>(slots) * sizeof(uint64_t) : 0);
}

// Tokens of source s that this rank has received.
__device__ __forceinline__ int32_t received_from(const SmallCombineArgs& args, int s) {
  return args.plan.rank_count[s * args.dims.num_ranks + args.link.rank];
}

// What this block sends: rows of all sources, lined up source by source, the next rank first, so
// that no receiver is hit by all ranks at once. Lane l has the l-th of these sources. All functions
// by a whole warp.
struct BlockPartials {
  int num_ranks, rank, source;
  int32_t before;  // tokens of lower ranks
  int32_t end;     // rows of this block, of the sources up to this one
  int32_t rows;    // of all

  // received: [R] in shared memory, filled for whoever meets a barrier with the block's first warp.
  __device__ BlockPartials(const SmallCombineArgs& args, int senders, int32_t* received)
      : num_ranks(args.dims.num_ranks), rank(args.link.rank) {
    const int lane = lane_index();
    const int32_t tokens = lane < num_ranks ? received_from(args, lane) : 0;
    if (warp_index() == 0 && lane < num_ranks) received[lane] = tokens;
    source = (rank + 1 + lane) % num_ranks;
    before = __shfl_sync(kFullWarp, up_to_lane(tokens) - tokens, source);
    const int32_t own = BlockRows(__shfl_sync(kFullWarp, tokens, source), senders).count;
    end = up_to_lane(lane < num_ranks ? own : 0);
    rows = __shfl_sync(kFullWarp, end, kWarpSize - 1);
  }
  struct Row {
    int source;
    int32_t i;  // of the tokens received from source
    int32_t n;  // received token
  };
  // Row q < rows. own: of any number of rows.
  __device__ __forceinline__ Row at(const BlockRows& own, int q) const {
    const int l = __popc(__ballot_sync(kFullWarp, lane_index() < num_ranks && end <= q));
    const int32_t earlier = __shfl_sync(kFullWarp, end, (l + kWarpSize - 1) % kWarpSize);
    const int32_t i = own.at(q - (l > 0 ? earlier : 0));
    return {__shfl_sync(kFullWarp, source, l), i, __shfl_sync(kFullWarp, before, l) + i};
  }
  // The received token that is the i-th from a source.
  __device__ __forceinline__ int32_t received_token(int of, int32_t i) const {
    return __shfl_sync(kFullWarp, before, (of - rank - 1 + num_ranks) % num_ranks) + i;
  }
};

// Of a partial row as it crosses.
__host__ __device__ constexpr int sent_row_bytes(Quant quant, int hidden, int element_bytes) {
  return quant == Quant::kFp8 ? static_cast<int>(fp8_row_bytes(hidden)) : hidden * element_bytes;
}

// A job's part of a partial row that is one row as it is.
template <Dtype kDtype>
__device__ __forceinline__ void copy_row(const SmallCombineArgs& args, const PartialToken& token,
                                         const RowJob& job, char* to) {
  uint32_t rest = token.summands;
  const char* from =
      args.x + int64_t{token.row_of(take_lowest(rest))} * args.hidden * kElementBytes<kDtype>;
  using Rows = BatchOf<kSmallUnroll>;
  for (int at = job.begin; at < job.end; at += Rows::kStep) {
    const int v = at + lane_index();
    Rows batch{};
    batch.load(from, v, job.end);
    batch.store(to, v, job.end);
  }
}

// A job's part of a partial row.
template <Quant kQuant, bool kWeighted, Dtype kDtype>
__device__ __forceinline__ void store_partial(const SmallCombineArgs& args,
                                              const PartialToken& token, const RowJob& job,
                                              char* to) {
  constexpr bool kFp8 = kQuant == Quant::kFp8;
  const int row_bytes = args.hidden * kElementBytes<kDtype>;
  if (!kFp8 && token.is_one_row()) return copy_row<kDtype>(args, token, job, to);
  // Several slots with one row, as in layout kToken.
  const bool read_once = kWeighted && __popc(distinct_rows(token.row)) == 1;
  constexpr int kSummandsAtOnce = kFp8 ? 2 : 3;  // what there are registers for
  [[maybe_unused]] ScaleRange range{};
  if constexpr (kFp8)
    range = ScaleRange::of<kQuant, kDtype>(job, row_bytes / kVectorBytes,
                                           make_quant_layout(kQuant, args.hidden));
  [[maybe_unused]] char* staged = dynamic_shared() + warp_index() * kStagedScaleBytes;
  for (int at = job.begin; at < job.end; at += Batch::kStep) {
    const int v = at + lane_index();
    Sum<kDtype> sum;
    sum.clear();
    if (read_once) {
      Batch batch{};
      add_rows(args.x, row_bytes, token, v, job.end, batch, sum);
    } else {
      add_rows_at_once<kSummandsAtOnce, kWeighted>(args.x, row_bytes, token, v, job.end, sum);
    }
    if constexpr (kFp8) {
      store_sum_fp8(sum, to, staged - range.begin, v, job.end);
    } else {
      Batch batch;
      sum.round_to(batch);
      batch.store(to, v, job.end);
    }
  }
  if constexpr (kFp8) {
    __syncwarp();
    copy_bytes(to + args.hidden + range.begin, staged, range.bytes);
    __syncwarp();  // before the scales of the next job
  }
}

// begin() is called by the whole block between the rows and their signals, and says whether the
// call goes on; what it returns, or false where a wait for weights was given up. start is looked at
// only when the first records have been asked for. Nothing is sent if the link is lost.
template <class Link, Quant kQuant, Dtype kDtype, class Begin>
__device__ __forceinline__ bool send_partials(const SmallCombineArgs& args, int senders,
                                              const LinkStart& start, LinkCall& call, Begin begin) {
  EPCOMM_SHARED(int32_t[kMaxLinkRanks], received);
  const LinkArgs& link = args.link;
  const int topk = args.dims.topk;
  constexpr bool kFp8 = kQuant == Quant::kFp8;
  const int row_bytes = args.hidden * kElementBytes<kDtype>;
  const auto sent_bytes =
      static_cast<uint32_t>(sent_row_bytes(kQuant, args.hidden, kElementBytes<kDtype>));
  const MetaLayout meta(topk);
  const BlockRows own(0, senders);
  const BlockPartials partials(args, senders, received);
  int least_parts = 1;
  if constexpr (kFp8) least_parts = least_quant_parts<kQuant, kDtype>(row_bytes / kVectorBytes);
  const auto jobs = SmallJobs::of_block(partials.rows, row_bytes, kUnroll, least_parts);
  // The partial row for token t of rank s, the i-th received from there: here, and at its owner.
  uint64_t epoch = 0;
  auto piece_of = [&](int s, int32_t i, int32_t t) -> LinkPiece {
    if (t < 0 || t >= args.small.max_tokens) return {};
    const size_t to = args.small.row(link.rank, epoch, t);
    const bool there = Link::kMapped || s == link.rank;
    return {there ? to : args.small.outbox_row(s, i), to, sent_bytes};
  };
  // What the record of a job's token says is on its way while the job before is worked on.
  struct Next {
    BlockPartials::Row at;
    int32_t token, row;
  };
  auto fetch = [&](int j) -> Next {
    if (j >= jobs.count) return {};
    const auto at = partials.at(own, jobs.at(j).row);
    void* record = meta.row(args.plan.recv_meta, at.n);
    return {at, *meta.token(record, 0),
            lane_index() < topk ? meta.row(record, 0)[lane_index()] : -1};
  };
  Next next = fetch(jobs.first);
  epoch = start.epoch();
  const bool sends = !start.lost();
  bool lost = false;
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const Next now = next;
    next = fetch(j + jobs.step);
    const int s = now.at.source;
    const LinkPiece place = piece_of(s, now.at.i, now.token);
    if (place.bytes == 0 || !sends) continue;
    const bool weighted = args.topk_weights != nullptr;
    float weight = 0.0f;
    if (weighted && !lost) {
      const uint64_t* weights = sent_weights<Link>(link, args.small, epoch, s);
      weight = sent_weight<Link>(
          link, s, lane_index() < topk ? weights + now.token * topk + lane_index() : nullptr, epoch,
          lost);
    }
    if (lost) continue;
    const PartialToken token(args.by_token ? now.at.n : now.row, weight, weighted);
    char* to = link.window[Link::kMapped ? s : link.rank] + place.from;
    if (weighted)
      store_partial<kQuant, true, kDtype>(args, token, job, to);
    else
      store_partial<kQuant, false, kDtype>(args, token, job, to);
  }
  if (!begin()) return false;
  if (__syncthreads_or(lost)) {
    // Rows are missing: nothing may say that they are there.
    if (thread_index() == 0) {
      atomicExch(&link.state->lost, 1u);
      call.bad = LinkCall::kLost;
    }
    __syncthreads();
    return false;
  }
  signal_shares<Link>(
      link, args.small, epoch, own, [&](int s) { return received[s]; },
      [&](int s, int i) {
        const int32_t n = partials.received_token(s, i);
        return piece_of(s, i, *meta.token(args.plan.recv_meta, n));
      });
  return true;
}

// The tokens of this rank, by a team. False: the warp has given up a wait.
template <class Link, Quant kQuant, Dtype kDtype>
__device__ __forceinline__ bool sum_partials(const SmallCombineArgs& args, const SmallTeam& team,
                                             const StagedRows<Link>& rows) {
  EPCOMM_SHARED(int32_t[kMaxPackRanks], sent_before);
  constexpr int kRowsAtOnce = kQuant == Quant::kFp8 ? 2 : 3;  // what there are registers for
  using Arrived = std::conditional_t<kQuant == Quant::kFp8, ArrivedFp8<kDtype>, ArrivedRow<kDtype>>;
  const LinkArgs& link = args.link;
  const int num_ranks = args.dims.num_ranks, lane = lane_index();
  count_sent_before(sent_before, args.plan.rank_count, num_ranks, link.rank);
  const int64_t row_bytes = int64_t{args.hidden} * kElementBytes<kDtype>;
  const int sent_bytes = sent_row_bytes(kQuant, args.hidden, kElementBytes<kDtype>);
  const char* bias = static_cast<const char*>(args.bias);
  char* out = static_cast<char*>(args.out);
  const auto jobs = SmallJobs::of_team(team, args.num_tokens, static_cast<int>(row_bytes), kUnroll);
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int64_t t = job.row;
    const TokenRanks at_rank(args.plan.slot + t * num_ranks, sent_before, num_ranks);
    // A share counts the rows that one rank sends to this one: lane r has the signal of rank r.
    const RowPart whole = {sent_bytes, 0, sent_bytes};
    const RowPart part = {sent_bytes, job.begin * kVectorBytes, job.end * kVectorBytes};
    if (!Link::kMapped &&
        !rows.arrived_each(lane, at_rank.low, kQuant == Quant::kFp8 ? whole : part))
      return false;
    for (int at = job.begin; at < job.end; at += Batch::kStep) {
      const int v = at + lane;
      Sum<kDtype> sum;
      sum.clear();
      for (uint64_t rest = at_rank.ranks(); rest != 0;) {
        Arrived arrived[kRowsAtOnce] = {};  // so that none lives from one round to the next
        const int count = min(__popcll(rest), kRowsAtOnce);
        char* from[kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i)
          from[i] = rows.row(i < count ? take_lowest(rest) : 0, t);
        // Lane i looks for what is stored last of the i-th row.
        const uint32_t* probe = nullptr;
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i)
          if (i < count && i == lane)
            probe = Arrived::last(from[i], args.hidden, min(at + Batch::kStep, job.end));
        auto load = [&] {
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i)
            arrived[i].load(from[i], args.hidden, v, i < count ? job.end : 0);
          bool there = true;
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i)
            there &= arrived[i].is_there(v, i < count ? job.end : 0);
          return there;
        };
        if constexpr (!Link::kMapped)
          load();
        else if (!rows.wait(lane, at_rank.low, probe, load))
          return false;
        if constexpr (Link::kMapped)
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i)
            Arrived::unwrite(from[i], args.hidden, v, i < count ? job.end : 0);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i)
          if (i < count) arrived[i].add_to(sum);
      }
      Batch batch{};
      if (bias != nullptr) {
        batch.load(bias + t * row_bytes, v, job.end);
        sum.add(batch);
      }
      sum.round_to(batch);
      batch.store(out + t * row_bytes, v, job.end);
    }
  }
  rows.clean_up(team, num_ranks, [&](int s, int t) -> size_t {
    const bool taken = t < args.num_tokens && args.plan.slot[t * num_ranks + s] >= 0;
    return taken ? static_cast<size_t>(sent_bytes) : 0;
  });
  return true;
}

template <class Link, Quant kQuant, Dtype kDtype>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_combine_kernel(const __grid_constant__ SmallCombineArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  const LinkArgs& link = args.link;
  const LinkStart start(link);
  const SmallBlocks blocks(args.phase, kCombineSenders);
  const bool weighted = args.topk_weights != nullptr, announces = blockIdx.x == 0;
  const bool marks_first = args.phase == Phase::kAll || weighted;  // before the first wait
  // A block that sends rows begins when they are on their way, but for weights, which it waits for.
  const bool begins_late = blocks.sends() && !weighted && !announces;
  auto begin = [&] {
    return link_begin_briefly<Link>(link, call, start, args.phase != Phase::kSend);
  };
  bool going = begins_late || begin();
  if (going && blocks.sends()) {
    if (announces) {
      if (thread_index() == 0 && marks_first) link_mark_begun(link, call, Link::kMapped);
      announce<Link>(args, call.epoch);
    }
    if (weighted) going = link_agree_briefly<Link>(link, call, false);
    if (going)
      going = send_partials<Link, kQuant, kDtype>(args, blocks.senders, start, call,
                                                  [&] { return !begins_late || begin(); });
  }
  if (args.phase == Phase::kSend) return;
  bool completed = true;
  if (blocks.receives()) {
    if (going && !marks_first && blocks.receivers.thread() == 0)
      link_mark_begun(link, call, Link::kMapped);
    // Of a block that has sent, too, for the host.
    if (call.bad != LinkCall::kLost)
      going = link_agree_briefly<Link>(link, call, blocks.receivers.block == 0);
    if (going)
      completed = sum_partials<Link, kQuant, kDtype>(
          args, blocks.receivers,
          StagedRows<Link>{link, args.small, call.epoch, call.clean, call.entry});
  }
  if constexpr (Link::kMapped)
    link_leave_silently(link, call, blocks.receives(), blocks.receivers.block == 0, going,
                        completed);
  else
    link_leave<Link>(link, call, going, completed, blocks.sends());
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
  const int blocks = small_blocks(num_sms);
  SmallCombineArgs call = args;
  // What comes back is about what went out.
  if constexpr (!Link::kMapped)
    call.link.entry.pieces =
        pieces_to_put(sending_blocks(args.phase, blocks, kCombineSenders), args.num_tokens,
                      std::min(args.dims.topk, args.dims.num_ranks - 1),
                      sent_row_bytes(args.quant, args.hidden, dtype_bytes(args.dtype)));
  launch("launch of small_combine",
         fp8 ? combine_kernel<Link, Quant::kFp8>(args.dtype)
             : combine_kernel<Link, Quant::kNone>(args.dtype),
         {blocks, kSmallThreads, staged}, stream, call);
}

}  // namespace epcomm
