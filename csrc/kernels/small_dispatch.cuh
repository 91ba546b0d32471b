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
//   3. Wait for the entries of all ranks, and have their ids. From them (kernels/small_route.cuh):
//      bit masks of all ranks' tokens, counts, the rows of every layout.
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
// kernels/small.cuh says, so that nothing waits until stores were acknowledged. Where the link
// puts, ids and weights are released by `entered` (kernels/link.cuh), rows by their signals.
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

namespace epcomm {
namespace {

// What the call delivers to this rank's experts, by a team.
__device__ __forceinline__ void count_received(const SmallDispatchArgs& args, const SmallTeam& team,
                                               const GroupRoute& route) {
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

// Where source's token t goes here, with what came with its id; lane k has slot k. n: received
// token. lost: set if a wait was given up.
template <class Link>
__device__ __forceinline__ TokenSlots slots_of(const SmallDispatchArgs& args,
                                               const GroupRoute& route, uint64_t epoch, int source,
                                               int t, int32_t n, bool& lost) {
  const PlaceArgs& place = args.place;
  const int lane = lane_index(), i = t * route.topk + lane;
  TokenSlots slots;
  slots.token = t;
  if (args.topk_weights != nullptr) {
    const uint64_t* weights = sent_weights<Link>(args.link, args.small, epoch, source);
    slots.weight = sent_weight<Link>(args.link, source, lane < route.topk ? weights + i : nullptr,
                                     epoch, lost);
  }
  if (lane >= route.topk) return slots;
  slots.expert = valid_expert(place, static_cast<int32_t>(ids_of<Link>(args, epoch, source)[i]));
  const MetaLayout meta(route.topk);
  if (args.topk_weights == nullptr && !args.records)
    slots.weight = meta.topk_weights(place.plan.recv_meta, n)[lane];
  if (slots.expert >= 0 && route.experts.owner(slots.expert) == route.rank)
    slots.row = valid_row(place, route.row(route.tile(source), slots.expert, t));
  return slots;
}

// What arrives goes to its rows, by a team. False: the warp has given up a wait.
template <class Link>
__device__ __forceinline__ bool receive_rows(const SmallDispatchArgs& args, const SmallTeam& team,
                                             const GroupRoute& route, const StagedRows<Link>& rows,
                                             const SourceRanges& ranges, const SmallJobs& jobs) {
  const PlaceArgs& place = args.place;
  const LinkArgs& link = args.link;
  const int lane = lane_index();
  const MetaLayout meta(route.topk);
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int s = ranges.source(job.row, route.num_ranks);
    const int t = job.row + ranges.to_source[s];
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
    const TokenSlots slots = slots_of<Link>(args, route, rows.epoch, s, t, fits ? n : 0, lost);
    if (lost) {
      if (lane == 0) atomicExch(&link.state->lost, 1u);
      return false;
    }
    const uint32_t firsts = fits ? distinct_rows(slots.row) : 0;
    const int32_t local = job.leads ? local_expert(place, slots) : -1;
    // One lane is enough, where more would cost more than one load.
    if (!Link::kMapped && !rows_arrived<Link>(link, args.small, rows.epoch, s, lane == 0 ? t : -1))
      return false;
    for (bool first = true; part.v - lane < job.end || part.w - lane < part.end_word;
         first = false) {
      if (Link::kMapped && !first) part.load();
      if (!rows.take(s, t, part)) return false;
      for (uint32_t rest = firsts; rest != 0;) {
        const int32_t to = __shfl_sync(kFullWarp, slots.row, take_lowest(rest));
        part.batch.store(place.recv_x + int64_t{to} * place.rows.row_bytes, part.v, job.end);
#pragma unroll
        for (int u = 0; u < part.kWords; ++u)
          if (const int w = part.w + u * kWarpSize; w < part.end_word)
            place_scale_word(place, to, w, part.word[u]);
      }
      part.v += part.batch.kStep;
      part.w += part.kWordStep;
    }
    if (job.leads && fits) {
      if (args.records)
        write_record(meta, meta.row(place.plan.recv_meta, n), slots, args.topk_weights != nullptr);
      place_outputs(place, n, slots, local, (firsts >> lane & 1) != 0);
    }
  }
  rows.clean_up(team, route.num_ranks, [&](int s, int t) -> size_t {
    const bool taken = t < ranges.end[s] + ranges.to_source[s] && route.tile(s).has(route.rank, t);
    return taken ? static_cast<size_t>(place.rows.row_bytes + place.rows.scale_bytes + 3) : 0;
  });
  return true;
}

// agreed: all ranks want the same and are there. Else what they have sent stays unread. clean: of
// LinkStart. False: the warp has given up a wait.
template <class Link>
__device__ __forceinline__ bool receive(const SmallDispatchArgs& args, const SmallBlocks& blocks,
                                        const LinkCall& call, bool agreed, bool clean) {
  EPCOMM_SHARED(SourceRanges, ranges);
  EPCOMM_SHARED(RouteTotals, totals);
  const GroupRoute route(args);
  ranges.fill(route.num_ranks, [&](int s) {
    const int32_t tokens =
        agreed ? max(min(call.entry[s].num_tokens, args.small.max_tokens), 0) : 0;
    return SourceCount{0, tokens, tokens};
  });
  auto tokens = [&](int s) { return ranges.end[s] + ranges.to_source[s]; };
  // What is written beside rows would delay them: where there are many blocks a few do nothing
  // else.
  constexpr int kReceiversOfRecorder = 16;
  const SmallTeam& all = blocks.receivers;
  const int apart = args.fresh ? all.blocks / kReceiversOfRecorder : 0;
  const SmallTeam recorders = {all.block, apart > 0 ? apart : all.blocks};
  const SmallTeam takers = {all.block - apart, all.blocks - apart};
  const auto jobs = SmallJobs::of_team(takers, ranges.end[route.num_ranks - 1],
                                       args.place.rows.row_bytes, kSmallUnroll);
  const bool routed =
      route_group<Link>(args, route, recorders.here() ? RouteColumns::kAll : RouteColumns::kOwn,
                        args.fresh && all.block == 0, call.epoch, totals, tokens);
  if (agreed && routed && args.totals != nullptr && all.block == 0)
    tell_totals(args, route, totals);
  if (recorders.here()) {
    if (args.fresh) {
      write_counts(args, recorders, route, totals);
      write_places<Link>(args, recorders, route, call.epoch, agreed);
    }
    if (args.link.statistics.received_tokens != nullptr) count_received(args, recorders, route);
    clear_rest(args, recorders, route, totals);
  }
  if (!agreed) return true;
  if (!routed || !takers.here()) return routed;
  const StagedRows<Link> rows{args.link, args.small, call.epoch, clean};
  return receive_rows<Link>(args, takers, route, rows, ranges, jobs);
}

template <class Link, Quant kQuant, Dtype kDtype>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_dispatch_kernel(const __grid_constant__ SmallDispatchArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  EPCOMM_SHARED(int32_t, first_bad);
  const LinkArgs& link = args.link;
  const LinkStart start(link);
  const SmallBlocks blocks(args.phase, kDispatchSenders);
  const bool announces = blockIdx.x == 0;
  // A block that sends rows begins when they are on their way.
  const bool begins_late = blocks.sends() && !announces;
  bool going = begins_late || link_begin(link, call, start);
  if (going && blocks.sends()) {
    if (announces) {
      if (thread_index() == 0 && args.phase == Phase::kAll) link_mark_begun(link, call);
      announce<Link>(args, call.epoch, first_bad);
    }
    if constexpr (!kPuts<Link>) send_ids<Link>(args, blocks, start);
    const BlockRows own(args.num_tokens, blocks.senders);
    send_rows<Link, kQuant, kDtype>(args, own, start);
    if (begins_late) going = link_begin(link, call, start);
    if (going) signal_rows<Link>(args, own, call.epoch);
  }
  if (args.phase == Phase::kSend) return;
  bool agreed = going, completed = true;
  if (blocks.receives()) {
    if (going && args.phase == Phase::kReceive && blocks.receivers.thread() == 0)
      link_mark_begun(link, call);
    prepare_route(args, GroupRoute(args));
    if (going) agreed = link_agree_briefly<Link>(link, call, blocks.receivers.block == 0);
    completed = receive<Link>(args, blocks, call, agreed, start.clean());
  }
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
  launch("launch of small_dispatch", kernel_of<Link>(args),
         {small_blocks(num_sms, Link::kMapped), kSmallThreads,
          std::max(small_shared_bytes(args.place.dims, args.small.max_tokens), staged)},
         stream, args);
}

}  // namespace epcomm
