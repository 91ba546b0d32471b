// Dispatch of a small batch, in one kernel: expert ids and rows go out together, and the blocks
// that receive work the routing of all ranks out from the ids while the rows are under way.
//
// Blocks that send (kernels/small.cuh):
//   1. Block 0 announces the call to all ranks. Every block sends the ids and weights of its
//      tokens, those of its shares, to all ranks.
//   2. Rows: of these tokens, each once per destination rank, quantised in registers if asked. Then
//      their signals.
// Blocks that receive:
//   3. Wait for the entries of all ranks, and have their ids. From them (kernels/small_route.cuh):
//      bit masks of all ranks' tokens, counts, the rows of every layout. Fill the plan, and clear
//      what no token will write.
//   4. Each received token, when it has arrived, goes to the rows that carry it.
// The send half is 1 and 2, the receive half 3 and 4.
//
// Buffers: topk_idx [T, K] (or plan.topk_idx), topk_weights, x, scales are read. In every rank's
// window, at SmallLayout of this rank and epoch: ids, weights, rows. From this rank's window, of
// all sources: the same; the rows are unwritten afterwards. Written: the plan, its records, and the
// outputs of place. Launch: num_sms blocks of 512 threads, one per SM. Sending, warps share the
// rows of their block; receiving, all warps that do share all rows, cut into parts. Rows go through
// registers. Host guarantees: max_tokens is at most kTileTokens, small_shared_bytes at most
// kMaxSmallShared. Memory order: ids and weights are words that carry the epoch, rows are taken as
// kernels/small.cuh says, so that nothing waits until stores were acknowledged. Where the link
// puts, ids are released by `entered` (kernels/link.cuh), rows by their signals. Blocks wait for
// other blocks, of this rank, too, so all of them must find room at some time.
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

namespace epcomm {
namespace {

static_assert(sizeof(SmallDispatchArgs) <= kMaxKernelArgs);
constexpr int32_t kNoBadId = 0x7fffffff;

// The expert id of slot i of this rank's batch as it was given.
__device__ __forceinline__ int64_t given_id(const SmallDispatchArgs& args, int i) {
  if (!args.fresh) return args.place.plan.topk_idx[i];
  return args.index_type == IndexType::kInt32
             ? int64_t{static_cast<const int32_t*>(args.topk_idx)[i]}
             : static_cast<const int64_t*>(args.topk_idx)[i];
}
__device__ __forceinline__ bool good_id(const SmallDispatchArgs& args, int64_t id) {
  return id >= -1 && id < args.place.dims.num_experts;
}

// Pieces that are announced, where the link puts: ids, and weights where there are any.
__device__ __forceinline__ int num_pieces(const SmallDispatchArgs& args) {
  return args.topk_weights != nullptr ? 2 : 1;
}

// ---- sending ----

// Stores slot i of this rank's ids and weights to all ranks, or, where the link does not map them,
// to this rank's own window. expert: -1 = none.
template <class Link>
__device__ __forceinline__ void store_slot(const SmallDispatchArgs& args, uint64_t epoch, int i,
                                           int32_t expert, float weight) {
  const LinkArgs& link = args.link;
  const size_t ids = args.small.source_ids(link.rank, epoch);
  const size_t weights = args.small.source_weights(link.rank, epoch);
  for (int r = 0; r < (Link::kMapped ? link.num_ranks : 1); ++r) {
    char* window = link.window[(link.rank + r) % link.num_ranks];
    store_tagged(window + ids, i, epoch, static_cast<uint32_t>(expert));
    if (args.topk_weights != nullptr)
      store_tagged(window + weights, i, epoch, __float_as_uint(weight));
  }
}

// The ids and weights of the tokens of this block, by its warps, a token each, ahead of all rows:
// what every rank routes by must not queue behind them. Where the link puts, block 0 has those of
// all tokens. -1 for tokens that there are not.
template <class Link, class Start>
__device__ __forceinline__ void send_ids(const SmallDispatchArgs& args, const SmallBlocks& blocks,
                                         const Start& start) {
  const int topk = args.place.dims.topk, max_tokens = args.small.max_tokens;
  const BlockRows own(max_tokens, blocks.senders);
  const int count = Link::kMapped ? own.count : blockIdx.x == 0 ? max_tokens : 0;
  for (int n = warp_index(); n < count; n += kSmallWarps) {
    const int t = Link::kMapped ? own.at(n) : n, i = t * topk + lane_index();
    if (lane_index() >= topk) continue;
    int32_t expert = -1;
    float weight = 0.0f;
    if (t < args.num_tokens) {
      const int64_t id = given_id(args, i);
      if (args.topk_weights != nullptr) weight = args.topk_weights[i];
      if (good_id(args, id)) expert = static_cast<int32_t>(id);
      if (args.fresh) args.place.plan.topk_idx[i] = expert;
    }
    if (!start.lost()) store_slot<Link>(args, start.epoch(), i, expert, weight);
  }
}

// By a block: the first slot of this rank with a bad id. Ends with a barrier.
__device__ __forceinline__ void find_bad_id(const SmallDispatchArgs& args, int32_t& first_bad) {
  if (thread_index() == 0) first_bad = kNoBadId;
  __syncthreads();
  for (int i = thread_index(); i < args.num_tokens * args.place.dims.topk; i += kSmallThreads)
    if (!good_id(args, given_id(args, i))) atomicMin(&first_bad, i);
  __syncthreads();
}

// The id at slot first_bad, as far as an int32 can tell.
__device__ __forceinline__ int32_t bad_id(const SmallDispatchArgs& args, int32_t first_bad) {
  const int64_t bad = max(min(given_id(args, first_bad), int64_t{INT32_MAX}), int64_t{INT32_MIN});
  return static_cast<int32_t>(bad);
}

__device__ __forceinline__ void report_bad_id(const SmallDispatchArgs& args, int32_t first_bad) {
  if (thread_index() != 0 || first_bad == kNoBadId || args.bad_index == nullptr) return;
  args.bad_index[1] = bad_id(args, first_bad);
  args.bad_index[2] = args.place.dims.topk;
  fence_system();  // the host takes the position as the sign that the rest is there
  args.bad_index[0] = first_bad + 1;
}

// By block 0: the entry, and, where the link puts, the ids and weights that it has stored.
template <class Link>
__device__ __forceinline__ void announce(const SmallDispatchArgs& args, uint64_t epoch,
                                         int32_t& first_bad) {
  const LinkArgs& link = args.link;
  const int slots = args.num_tokens * args.place.dims.topk;
  find_bad_id(args, first_bad);
  const size_t bytes = static_cast<size_t>(slots) * sizeof(uint64_t);
  const LinkPieces pieces = {{same_place(args.small.source_ids(link.rank, epoch), bytes),
                              same_place(args.small.source_weights(link.rank, epoch), bytes)},
                             num_pieces(args)};
  EntryNews news;
  if (first_bad != kNoBadId && args.bad_index == nullptr)
    news = {0, first_bad + 1, bad_id(args, first_bad)};
  link_announce<Link>(link, epoch, nullptr, 0, pieces, news);
  report_bad_id(args, first_bad);
}

// The ranks that token t goes to, one bit each; by a warp.
__device__ __forceinline__ uint32_t destinations(const SmallDispatchArgs& args, int t) {
  const int topk = args.place.dims.topk;
  uint32_t ranks = 0;
  if (lane_index() < topk) {
    const int64_t id = given_id(args, t * topk + lane_index());
    if (id >= 0 && good_id(args, id)) ranks = 1u << args.place.experts.rank[id];
  }
  return __reduce_or_sync(kFullWarp, ranks);
}

// Calls to(window of r) for all ranks of a set, beginning with this one: no receiver is hit by all
// senders at once.
template <class To>
__device__ __forceinline__ void for_ranks(const LinkArgs& link, uint32_t ranks, To to) {
  const uint32_t lower = lanes_below(link.rank);
  for (uint32_t rest = ranks & ~lower; rest != 0;) to(link.window[take_lowest(rest)]);
  for (uint32_t rest = ranks & lower; rest != 0;) to(link.window[take_lowest(rest)]);
}

// Scales that were passed in: whole words, whatever their address.
__device__ __forceinline__ void send_scales(const SmallDispatchArgs& args, int t, size_t slot,
                                            uint32_t ranks) {
  const int row_bytes = args.place.rows.row_bytes, scale_bytes = args.place.rows.scale_bytes;
  if (scale_bytes == 0) return;
  const char* from = args.scales + int64_t{t} * scale_bytes;
  for (int begin = lane_index() * 4; begin < scale_bytes; begin += kWarpSize * 4) {
    uint32_t word = 0;
    if (reinterpret_cast<uintptr_t>(from) % 4 == 0 && begin + 4 <= scale_bytes) {
      word = *reinterpret_cast<const uint32_t*>(from + begin);
    } else {
      for (int b = 0; b < 4 && begin + b < scale_bytes; ++b)
        word |= static_cast<uint32_t>(static_cast<uint8_t>(from[begin + b])) << 8 * b;
    }
    for_ranks(args.link, ranks, [&](char* window) {
      *reinterpret_cast<uint32_t*>(window + slot + row_bytes + begin) = word;
    });
  }
}

// Uses the shared memory of routing, which begins after the next barrier. Start: LinkStart, which
// is looked at only when the first row has been asked for. Nothing is sent if the link is lost.
template <class Link, Quant kQuant, Dtype kDtype, class Start>
__device__ __forceinline__ void send_rows(const SmallDispatchArgs& args, const BlockRows& own,
                                          const Start& start) {
  constexpr bool kQuantised = kQuant != Quant::kNone;
  const LinkArgs& link = args.link;
  const int x_bytes =
      kQuantised ? args.hidden * kElementBytes<kDtype> : args.place.rows.row_bytes;  // of a row
  int least_parts = 1;
  if constexpr (kQuantised) least_parts = least_quant_parts<kQuant, kDtype>(x_bytes / kVectorBytes);
  const GlobalScale global = make_global_scale(kQuant == Quant::kNvfp4 ? *args.global_scale : 1.0f);
  char* staged = dynamic_shared() + warp_index() * kStagedScaleBytes;
  constexpr int kVectors = kQuantised ? kUnroll : kSmallUnroll;
  using Rows = BatchOf<kVectors>;
  // Parts of rows that are quantised begin where a word of scales does, of any format.
  constexpr int kUnit = kQuantised ? Rows::kStep : kWarpSize;
  static_assert(!kQuantised || kUnit * kVectorBytes / 4 % (4 * 128) == 0);
  const auto jobs = SmallJobs::of_block(own.count, x_bytes, kVectors, least_parts, kUnit);
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int t = own.at(job.row);
    size_t slot = 0;
    uint32_t ranks = 0;
    [[maybe_unused]] QuantLayout layout;
    [[maybe_unused]] ScaleRange range;
    if constexpr (kQuantised) {
      layout = make_quant_layout(kQuant, args.hidden);
      range = ScaleRange::of<kQuant, kDtype>(job, jobs.vectors, layout);
    }
    for (int at = job.begin; at < job.end; at += Rows::kStep) {
      const int v = at + lane_index();
      Rows batch;
      batch.load(args.x + int64_t{t} * x_bytes, v, job.end);
      // The row is on its way before it is known where it goes.
      if (at == job.begin) {
        ranks = Link::kMapped ? destinations(args, t) : 1u << link.rank;
        if (start.lost()) ranks = 0;
        slot = args.small.row(link.rank, start.epoch(), t);
      }
      if constexpr (kQuantised) {
        const QuantBatch<kQuant, kDtype> made(batch, global);
        made.store_scales(staged - range.begin, v, job.end);
        for_ranks(link, ranks, [&](char* window) { made.store(window + slot, v, job.end); });
      } else {
        for_ranks(link, ranks, [&](char* window) { batch.store(window + slot, v, job.end); });
      }
    }
    if constexpr (kQuantised) {
      if (job.end == jobs.vectors)
        finish_scales<kQuant>(staged - range.begin, layout, global.global);
      __syncwarp();
      for_ranks(link, ranks, [&](char* window) {
        copy_bytes(window + slot + layout.row_bytes + range.begin, staged, range.bytes);
      });
      __syncwarp();  // before the scales of the next job
    } else if (job.leads) {
      send_scales(args, t, slot, ranks);
    }
  }
}

// Where row t is, for a link that puts it.
__device__ __forceinline__ LinkPiece staged_row(const SmallDispatchArgs& args, uint64_t epoch,
                                                int peer, int t) {
  const RowSpec& rows = args.place.rows;
  const bool sent = (destinations(args, t) >> peer & 1) != 0;
  return same_place(args.small.row(args.link.rank, epoch, t),
                    sent ? static_cast<size_t>(rows.row_bytes + rows.scale_bytes) : 0);
}

template <class Link>
__device__ __forceinline__ void signal_rows(const SmallDispatchArgs& args, const BlockRows& own,
                                            uint64_t epoch) {
  signal_shares<Link>(
      args.link, args.small, epoch, own, [&](int) { return args.num_tokens; },
      [&](int peer, int t) { return staged_row(args, epoch, peer, t); });
}

// ---- receiving ----

// What the call delivers to this rank's experts, by all blocks that receive.
__device__ __forceinline__ void count_received(const SmallDispatchArgs& args,
                                               const SmallBlocks& blocks, const GroupRoute& route) {
  for (int e = blocks.spread_thread(11); e < args.place.dims.num_experts; e += blocks.threads())
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

__device__ __forceinline__ void clear_rest(const SmallDispatchArgs& args, const SmallBlocks& blocks,
                                           const GroupRoute& route, const RouteTotals& totals) {
  const PlaceArgs& place = args.place;
  if (place.recv_topk_idx == nullptr && place.recv_topk_weights == nullptr) return;
  const int topk = route.topk;
  if (route.by_token)
    return clear_entries(place, int64_t{totals.rank[route.rank]} * topk,
                         int64_t{place.recv_capacity} * topk, blocks.thread(), blocks.threads());
  const bool padded = place.layout == Layout::kPadded;
  const int32_t alignment = args.expert_alignment;
  // The rest of an expert's group, by a warp.
  for (int e = blocks.spread_warp(4); e < place.dims.num_experts; e += blocks.warps()) {
    if (route.experts.owner(e) != route.rank) continue;
    const int32_t start = route.experts.start(e), total = route.experts.total(e);
    const int32_t group = padded ? route.num_ranks * args.small.max_tokens
                                 : (total + alignment - 1) / alignment * alignment;
    clear_entries(place, start + total, min(start + group, place.row_capacity), lane_index(),
                  kWarpSize);
  }
  if (!padded)
    clear_entries(place, totals.rows, place.row_capacity, blocks.thread(), blocks.threads());
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
    const auto* weights = reinterpret_cast<const uint64_t*>(
        args.link.window[args.link.rank] + args.small.source_weights(source, epoch));
    slots.weight = tagged_weight<Link>(args.link, source, lane < route.topk ? weights + i : nullptr,
                                       epoch, lost);
  }
  if (lane >= route.topk) return slots;
  slots.expert = valid_expert(place, static_cast<int32_t>(ids_of(args, epoch, source)[i]));
  const MetaLayout meta(route.topk);
  if (args.topk_weights == nullptr && !args.records)
    slots.weight = meta.topk_weights(place.plan.recv_meta, n)[lane];
  if (slots.expert >= 0 && route.experts.owner(slots.expert) == route.rank)
    slots.row = valid_row(place, route.row(route.tile(source), slots.expert, t));
  return slots;
}

// What arrives goes to its rows, by all warps that receive. False: the warp has given up a wait.
template <class Link>
__device__ __forceinline__ bool receive_rows(const SmallDispatchArgs& args,
                                             const SmallBlocks& blocks, const GroupRoute& route,
                                             const StagedRows<Link>& rows,
                                             const SourceRanges& ranges) {
  const PlaceArgs& place = args.place;
  const LinkArgs& link = args.link;
  const int lane = lane_index();
  const MetaLayout meta(route.topk);
  const auto jobs = SmallJobs::of_receivers(blocks, ranges.end[route.num_ranks - 1],
                                            place.rows.row_bytes, kSmallUnroll);
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
  rows.clean_up(blocks, route.num_ranks, [&](int s, int t) -> size_t {
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
  const bool routed = route_group<Link>(args, blocks, route, call.epoch, totals, tokens);
  if (agreed && routed && args.totals != nullptr && blocks.receiver == 0)
    tell_totals(args, route, totals);
  if (args.fresh) {
    write_counts(args, blocks, route, totals);
    write_places(args, blocks, route, call.epoch, agreed);
  }
  if (args.link.statistics.received_tokens != nullptr) count_received(args, blocks, route);
  clear_rest(args, blocks, route, totals);
  if (!agreed) return true;
  const StagedRows<Link> rows{args.link, args.small, call.epoch, clean};
  return routed && receive_rows<Link>(args, blocks, route, rows, ranges);
}

template <class Link, Quant kQuant, Dtype kDtype>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_dispatch_kernel(const __grid_constant__ SmallDispatchArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  EPCOMM_SHARED(int32_t, first_bad);
  const LinkArgs& link = args.link;
  const LinkStart start(link);
  const SmallBlocks blocks(args.phase);
  const bool announces = blockIdx.x == 0;
  // A block that sends rows begins when they are on their way.
  const bool begins_late = blocks.sends() && !announces;
  bool going = begins_late || link_begin(link, call, start);
  if (going && blocks.sends()) {
    if (announces) {
      if (thread_index() == 0 && args.phase == Phase::kAll) link_mark_begun(link, call);
      if (!Link::kMapped) send_ids<Link>(args, blocks, start);
      announce<Link>(args, call.epoch, first_bad);
    }
    if (Link::kMapped) send_ids<Link>(args, blocks, start);
    const BlockRows own(args.num_tokens, blocks.senders);
    send_rows<Link, kQuant, kDtype>(args, own, start);
    if (begins_late) going = link_begin(link, call, start);
    if (going) signal_rows<Link>(args, own, call.epoch);
  }
  if (args.phase == Phase::kSend) return;
  bool agreed = going, completed = true;
  if (blocks.receives()) {
    if (going && args.phase == Phase::kReceive && blocks.thread() == 0) link_mark_begun(link, call);
    prepare_route(args, GroupRoute(args));
    if (going)
      agreed = link_agree_briefly<Link>(link, call, blocks.receiver == 0, num_pieces(args));
    completed = receive<Link>(args, blocks, call, agreed, start.clean());
  }
  link_leave<Link>(link, call, agreed, completed);
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
          std::max(small_shared_bytes(args.place.dims, args.small.max_tokens), staged),
          !Link::kMapped},
         stream, args);
}

}  // namespace epcomm
