// Dispatch of a small batch, in one kernel: expert ids and rows go out together, and the blocks
// that receive work the routing of all ranks out from the ids while the rows are under way.
//
// Blocks that send (kernels/small_send.cuh):
//   1. Block 0 announces the call to all ranks. Every block sends the ids and weights of its
//      tokens, those of its shares, to all ranks; or, where the link puts, block 0 those of all
//      tokens, with the entry.
//   2. Rows: of these tokens, each once per destination rank, quantised in registers if asked. Then
//      their signals.
// Blocks that receive:
//   3. Make bit masks of all ranks' tokens from the ids as they come, and wait for the entries of
//      all ranks; where the link puts, ids come with these. From the masks
//      (kernels/small_route.cuh): counts, the rows of every layout.
//   4. A few of them, or all where there are few, fill the plan and clear what no token will write.
//      The others: each received token, when it has arrived, goes to the rows that carry it.
// The send half is 1 and 2, the receive half 3 and 4.
//
// Buffers: topk_idx [T, K] (or plan.topk_idx), topk_weights, x, scales are read. In every rank's
// window, at SmallLayout of this rank and epoch (ids and weights at ControlLayout::slots, where the
// link puts): ids, weights, rows. From this rank's window, of all sources: the same; the rows are
// unwritten afterwards. Written: the plan, its records, and the outputs of place.
// Launch: num_sms blocks of 512 threads, one per SM, all of which must find room at some time:
// blocks wait for other blocks, of this rank, too. Sending, warps share the rows of their block;
// receiving, all warps that do share all rows, cut into parts. Rows go through registers.
// Host guarantees: max_tokens is at most kTileTokens, small_shared_bytes at most kMaxSmallShared.
// Memory order: ids and weights are words that carry the epoch, rows are taken as
// kernels/small_staging.cuh says, so that nothing waits until stores were acknowledged. Where the
// link puts, ids and weights are released by `entered` (kernels/link.cuh), rows by their signals.
#pragma once

#include <algorithm>

#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/place.cuh"
#include "kernels/small.cuh"
#include "kernels/small.h"
#include "kernels/small_quant.cuh"
#include "kernels/small_route.cuh"
#include "kernels/small_send.cuh"
#include "kernels/small_staging.cuh"

namespace epcomm {
namespace {

// What the call delivers to this rank's experts, by a team.
__device__ __forceinline__ void count_received(const SmallDispatchArgs& args, const SmallTeam& team,
                                               const GroupRoute& route) {
#pragma unroll 1
  for (int e = team.spread_thread(11); e < args.place.dims.num_experts; e += team.threads())
    if (route.experts.owner(e) == route.rank)
      add_received(args.link.statistics, args.place.experts.local[e], route.experts.total(e));
}

// Entries [begin, end) of the outputs that no token writes, by threads first, first + step, ...
__device__ __forceinline__ void clear_entries(const PlaceArgs& place, int64_t begin, int64_t end,
                                              int first, int step) {
  if (begin >= end) return;
  const int words = static_cast<int>(place.index_type) / 4;
  if (place.recv_topk_idx != nullptr)
    fill_words(static_cast<uint32_t*>(place.recv_topk_idx) + begin * words, (end - begin) * words,
               0xffffffffu, first, step);
  if (place.recv_topk_weights != nullptr)
    fill_words(reinterpret_cast<uint32_t*>(place.recv_topk_weights) + begin, end - begin, 0, first,
               step);
}

__device__ __forceinline__ void clear_rest(const SmallDispatchArgs& args, const SmallTeam& team,
                                           const GroupRoute& route, const RouteTotals& totals) {
  const PlaceArgs& place = args.place;
  if (place.recv_topk_idx == nullptr && place.recv_topk_weights == nullptr) return;
  const int topk = route.topk;
  if (route.by_token)
    return clear_entries(place, int64_t{totals.rank[route.rank]} * topk,
                         int64_t{place.recv_capacity} * topk, team.thread(), team.threads());
  const bool padded = place.layout == Layout::kPadded;
  const int32_t alignment = args.expert_alignment;
  // The rest of an expert's group, by a warp.
#pragma unroll 1
  for (int e = team.spread_warp(4); e < place.dims.num_experts; e += team.warps()) {
    if (route.experts.owner(e) != route.rank) continue;
    const int32_t start = route.experts.start(e), total = route.experts.total(e);
    const int32_t group = padded ? route.num_ranks * args.small.max_tokens
                                 : (total + alignment - 1) / alignment * alignment;
    clear_entries(place, start + total, min(start + group, place.row_capacity), lane_index(),
                  kWarpSize);
  }
  if (!padded) clear_entries(place, totals.rows, place.row_capacity, team.thread(), team.threads());
}

// The token of a job, and what its source has sent beside its row: lane k has slot k. By a warp,
// all functions.
struct SentToken {
  int source = 0, t = 0;
  uint64_t id = 0, weight = 0;  // words of sent_ids and, if that is another, sent_weights

  // Asks for it; nothing waits until it is used. The ids have been seen.
  template <class Link>
  static __device__ __forceinline__ SentToken of_row(const SmallDispatchArgs& args,
                                                     const GroupRoute& route,
                                                     const SourceRanges& ranges, uint64_t epoch,
                                                     int row) {
    SentToken sent;
    sent.source = ranges.source(row, route.num_ranks);
    sent.t = row + ranges.to_source[sent.source];
    const bool asks = lane_index() < route.topk;
    const int i = sent.t * route.topk + lane_index();
    load_relaxed_system_if(asks, sent.id, ids_of<Link>(args, epoch, sent.source) + i);
    load_relaxed_system_if(!kPuts<Link> && asks && args.topk_weights != nullptr, sent.weight,
                           sent_weights<Link>(args.link, args.small, epoch, sent.source) + i);
    return sent;
  }
  // The lane's weight. lost: set if a wait was given up.
  template <class Link>
  __device__ __forceinline__ float weight_of_slot(const SmallDispatchArgs& args,
                                                  const GroupRoute& route, uint64_t epoch,
                                                  bool& lost) const {
    const bool asks = lane_index() < route.topk;
    if (Link::kMapped && !__all_sync(kFullWarp, !asks || TaggedWord::is_of(weight, epoch))) {
      const uint64_t* words = sent_weights<Link>(args.link, args.small, epoch, source);
      const int i = t * route.topk + lane_index();
      const LateWord late = wait_tagged_late(args.link, source, asks ? words + i : nullptr, epoch);
      lost |= late.lost;
      return weight_in<Link>(late.value);
    }
    return weight_in<Link>(kPuts<Link> ? id : weight);
  }
};

// Where a token goes here, with what came with its id; lane k has slot k. n: received token. lost:
// set if a wait was given up.
template <class Link>
__device__ __forceinline__ TokenSlots slots_of(const SmallDispatchArgs& args,
                                               const GroupRoute& route, uint64_t epoch,
                                               const SentToken& sent, int32_t n, bool& lost) {
  const PlaceArgs& place = args.place;
  TokenSlots slots;
  slots.token = sent.t;
  if (args.topk_weights != nullptr)
    slots.weight = sent.weight_of_slot<Link>(args, route, epoch, lost);
  if (lane_index() >= route.topk) return slots;
  slots.expert = valid_expert(place, static_cast<int32_t>(sent.id));
  const MetaLayout meta(route.topk);
  if (args.topk_weights == nullptr && !args.records)
    slots.weight = meta.topk_weights(place.plan.recv_meta, n)[lane_index()];
  if (slots.expert >= 0 && route.experts.owner(slots.expert) == route.rank)
    slots.row = valid_row(place, route.row(route.tile(sent.source), slots.expert, sent.t));
  return slots;
}

// What a job takes of a row: the first has the scales, too, at its end.
__device__ __forceinline__ RowPart part_of_row(const RowSpec& rows, const RowJob& job) {
  const int32_t bytes = rows.row_bytes + rows.scale_bytes;
  const bool to_end = job.leads && rows.scale_bytes != 0;
  return {bytes, job.begin * kVectorBytes, to_end ? bytes : job.end * kVectorBytes};
}

// What arrives goes to its rows, by a team. next: token of the warp's first job. False: the warp
// has given up a wait.
template <class Link>
__device__ __forceinline__ bool receive_rows(const SmallDispatchArgs& args, const SmallTeam& team,
                                             const GroupRoute& route, const StagedRows<Link>& rows,
                                             const SourceRanges& ranges, const SmallJobs& jobs,
                                             SentToken next) {
  const PlaceArgs& place = args.place;
  const LinkArgs& link = args.link;
  const int lane = lane_index();
  const MetaLayout meta(route.topk);
  const ScalePlaces scales(place);
#pragma unroll 1
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const SentToken sent = next;
    if (j + jobs.step < jobs.count)
      next = SentToken::of_row<Link>(args, route, ranges, rows.epoch, jobs.at(j + jobs.step).row);
    const int s = sent.source, t = sent.t;
    const RouteTile tile = route.tile(s);
    if (!tile.has(route.rank, t)) continue;
    const int32_t n = tile.place(route.rank, t);
    // A row for which there is no room is taken all the same.
    const bool fits = n < place.recv_capacity;
    typename StagedRows<Link>::template Part<kSmallUnroll> part;
    part.from = rows.row(s, t);
    part.words = part.from + place.rows.row_bytes;
    part.v = job.begin + lane;
    part.end_vector = job.end;
    part.w = lane;
    part.end_word = job.leads ? (place.rows.scale_bytes + 3) / 4 : 0;
    if (Link::kMapped) part.load();
    bool lost = false;
    const TokenSlots slots = slots_of<Link>(args, route, rows.epoch, sent, fits ? n : 0, lost);
    if (lost) {
      if (lane == 0) atomicExch(&link.state->lost, 1u);
      return false;
    }
    const int32_t local = job.leads ? local_expert(place, slots) : -1;
    const uint32_t firsts = fits ? distinct_rows(slots.row) : 0;
    // What does not come with the row is written while it is on its way.
    if (job.leads && fits) {
      if (args.records)
        write_record(meta, meta.row(place.plan.recv_meta, n), slots, args.topk_weights != nullptr);
      place_outputs(place, n, slots, local, (firsts >> lane & 1) != 0);
    }
    if (!Link::kMapped && !rows.arrived(s, t, part_of_row(place.rows, job))) return false;
#pragma unroll 1
    for (bool first = true; part.v - lane < job.end || part.w - lane < part.end_word;
         first = false) {
      if (Link::kMapped && !first) part.load();
      if (!rows.take(s, t, part)) return false;
#pragma unroll 1
      for (uint32_t rest = firsts; rest != 0;) {
        const int32_t to = __shfl_sync(kFullWarp, slots.row, take_lowest(rest));
        part.batch.store(place.recv_x + int64_t{to} * place.rows.row_bytes, part.v, job.end);
        if (part.end_word == 0) continue;
        char* scale_row = scales.of_row(to);
#pragma unroll
        for (int u = 0; u < part.kWords; ++u)
          if (const int w = part.w + u * kWarpSize; w < part.end_word)
            scales.store(scale_row, w, part.word[u]);
      }
      part.v += part.batch.kStep;
      part.w += part.kWordStep;
    }
  }
  rows.clean_up(team, route.num_ranks, [&](int s, int t) -> size_t {
    const bool taken = t < ranges.end[s] + ranges.to_source[s] && route.tile(s).has(route.rank, t);
    return taken ? static_cast<size_t>(place.rows.row_bytes + place.rows.scale_bytes + 3) : 0;
  });
  return true;
}

// The parts of the blocks that receive. What is written beside rows would delay them: where there
// are many blocks a few do nothing else.
struct ReceivingTeams {
  SmallTeam recorders, takers;

  __device__ __forceinline__ ReceivingTeams(const SmallTeam& all, bool fresh) {
    constexpr int kReceiversOfRecorder = 16;
    const int apart = fresh ? all.blocks / kReceiversOfRecorder : 0;
    recorders = {all.block, apart > 0 ? apart : all.blocks};
    takers = {all.block - apart, all.blocks - apart};
  }
  __device__ __forceinline__ RouteColumns columns() const {
    return recorders.here() ? RouteColumns::kAll : RouteColumns::kOwn;
  }
  // The first of the blocks.
  __device__ __forceinline__ bool leads() const { return recorders.block == 0; }
};

// agreed: all ranks want the same and are there. Else what they have sent stays unread. Where
// the link maps, mark_group has been called, unless the link was lost before. False: the warp has
// given up a wait.
template <class Link>
__device__ __forceinline__ bool receive(const SmallDispatchArgs& args, const ReceivingTeams& teams,
                                        const LinkCall& call, bool agreed) {
  EPCOMM_SHARED(SourceRanges, ranges);
  EPCOMM_SHARED(RouteTotals, totals);
  const GroupRoute route(args);
  ranges.fill(route.num_ranks, [&](int s) {
    const int32_t tokens =
        agreed ? max(min(call.entry[s].num_tokens, args.small.max_tokens), 0) : 0;
    return SourceCount{0, tokens, tokens};
  });
  const SmallTeam &recorders = teams.recorders, &takers = teams.takers;
  const auto jobs = SmallJobs::of_team(takers, ranges.end[route.num_ranks - 1],
                                       args.place.rows.row_bytes, kSmallUnroll);
  if (!Link::kMapped)
    mark_group<Link>(
        args, route, teams.columns(), call.epoch,
        [&](int s, bool) { return ranges.end[s] + ranges.to_source[s]; }, [] {});
  else if (!agreed)
    prepare_route_again(args);
  if (!Link::kMapped || !agreed) __syncthreads();
  // On its way while the block works out where tokens go.
  SentToken first;
  if (takers.here() && jobs.first < jobs.count)
    first = SentToken::of_row<Link>(args, route, ranges, call.epoch, jobs.at(jobs.first).row);
  place_group(args, route, teams.columns(), args.fresh && teams.leads(), totals);
  if (agreed && args.totals != nullptr && teams.leads()) tell_totals(args, route, totals);
  bool completed = true;
  if (agreed && takers.here()) {
    const StagedRows<Link> rows{args.link, args.small, call.epoch, call.clean, call.entry};
    completed = receive_rows<Link>(args, takers, route, rows, ranges, jobs, first);
  }
  if (!recorders.here()) return completed;
  if (args.fresh) {
    write_counts(args, recorders, route, totals);
    write_places<Link>(args, recorders, route, call.epoch, agreed);
  }
  if (args.link.statistics.received_tokens != nullptr) count_received(args, recorders, route);
  clear_rest(args, recorders, route, totals);
  return completed;
}

template <class Link>
constexpr int dispatch_senders = Link::kMapped ? kDispatchSenders : kDispatchPutters;

template <class Link, Quant kQuant, Dtype kDtype>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_dispatch_kernel(const __grid_constant__ SmallDispatchArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  EPCOMM_SHARED(int32_t, first_bad);
  const LinkArgs& link = args.link;
  const LinkStart start(link);
  const SmallBlocks blocks(args.phase, dispatch_senders<Link>);
  const bool announces = blockIdx.x == 0, receives = blocks.receives();
  // The memory that routing needs is where a block that sends gathers scales.
  if (receives && !blocks.sends()) prepare_route(args, GroupRoute(args));
  // A block that sends rows begins when they are on their way.
  const bool begins_late = blocks.sends() && !announces;
  auto begin = [&] {
    return link_begin_briefly<Link>(link, call, start, args.phase != Phase::kSend);
  };
  bool going = begins_late || begin();
  if (going && blocks.sends()) {
    if (announces) {
      if (thread_index() == 0 && args.phase == Phase::kAll)
        link_mark_begun(link, call, Link::kMapped);
      announce<Link>(args, call.epoch, first_bad);
    }
    const BlockRows own(args.num_tokens, blocks.senders);
    send_rows<Link, kQuant, kDtype>(args, own, start, [&] {
      if constexpr (!kPuts<Link>) send_ids<Link>(args, blocks, start);
    });
    if (begins_late) going = begin();
    if (going) signal_rows<Link>(args, own, call.epoch);
  }
  if (args.phase == Phase::kSend) return;
  bool agreed = going, completed = true;
  if (receives) {
    const ReceivingTeams teams(blocks.receivers, args.fresh);
    if (going && args.phase == Phase::kReceive && blocks.receivers.thread() == 0)
      link_mark_begun(link, call, Link::kMapped);
    if (blocks.sends()) {
      prepare_route_again(args);
      __syncthreads();
    }
    if (going) {
      // Ids are not waited for behind the entries, which come later: those of all tokens that there
      // could be, until an entry says how many there are.
      bool lost = false;
      BriefAhead ahead;
      if constexpr (Link::kMapped)
        lost = !mark_group<Link>(
            args, GroupRoute(args), teams.columns(), call.epoch,
            [&](int s, bool later) {
              const int most = args.small.max_tokens;
              return later ? announced_tokens(link, call.epoch, s, most) : most;
            },
            [&] { ahead.ask(link, call.epoch); });
      agreed = link_agree_briefly<Link>(link, call, teams.leads(), lost, ahead);
    }
    completed = receive<Link>(args, teams, call, agreed);
  }
  if constexpr (Link::kMapped)
    link_leave_silently(link, call, receives, blocks.receivers.block == 0, agreed, completed);
  else
    link_leave<Link>(link, call, agreed, completed, blocks.sends());
}

using SmallDispatchKernel = void (*)(SmallDispatchArgs);

template <class Link, Quant kQuant>
SmallDispatchKernel quantising_kernel(Dtype dtype) {
  return for_dtype(dtype, small_dispatch_kernel<Link, kQuant, Dtype::kBfloat16>,
                   small_dispatch_kernel<Link, kQuant, Dtype::kFloat16>,
                   small_dispatch_kernel<Link, kQuant, Dtype::kFloat32>);
}

template <class Link>
SmallDispatchKernel kernel_of(const SmallDispatchArgs& args) {
  switch (args.quant) {
    case Quant::kFp8:
      return quantising_kernel<Link, Quant::kFp8>(args.x_dtype);
    case Quant::kFp8Ue8m0:
      return quantising_kernel<Link, Quant::kFp8Ue8m0>(args.x_dtype);
    case Quant::kNvfp4:
      return quantising_kernel<Link, Quant::kNvfp4>(args.x_dtype);
    case Quant::kNone:
      break;
  }
  return small_dispatch_kernel<Link, Quant::kNone, Dtype::kBfloat16>;
}

}  // namespace

template <class Link>
void launch_small_dispatch(const SmallDispatchArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.x, "x");
  check_aligned(args.place.recv_x, "recv_x");
  const size_t staged = args.quant == Quant::kNone ? 0 : size_t{kSmallWarps} * kStagedScaleBytes;
  const int blocks = small_blocks(num_sms);
  SmallDispatchArgs call = args;
  const Dims& dims = args.place.dims;
  if constexpr (!Link::kMapped)
    call.link.entry.pieces =
        pieces_to_put(sending_blocks(args.phase, blocks, dispatch_senders<Link>), args.num_tokens,
                      std::min(dims.topk, dims.num_ranks - 1),
                      args.place.rows.row_bytes + args.place.rows.scale_bytes);
  launch("launch of small_dispatch", kernel_of<Link>(args),
         {blocks, kSmallThreads, std::max(small_shared_bytes(dims, args.small.max_tokens), staged)},
         stream, call);
}

}  // namespace epcomm
