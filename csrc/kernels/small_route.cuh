// Routing of a small batch: every block that receives works it out for the tokens of all ranks,
// from the expert ids that they have sent, in its own shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "epcomm/types.h"
#include "kernels/device.cuh"
#include "kernels/place.cuh"
#include "kernels/route_tile.cuh"
#include "kernels/small.cuh"
#include "kernels/small.h"

namespace epcomm {

// The routing of all ranks' tokens, in the shared memory of every block.
struct GroupRoute {
  int num_ranks, topk, rank, words;
  RouteTile shape;
  RouteExperts experts;
  bool by_token;

  __device__ explicit GroupRoute(const SmallDispatchArgs& args)
      : num_ranks(args.place.dims.num_ranks),
        topk(args.place.dims.topk),
        rank(args.place.rank),
        words(mask_words(args.small.max_tokens)),
        shape(args.place.dims, words),
        experts(args.place.dims),
        by_token(args.place.layout == Layout::kToken) {
    experts.memory = dynamic_shared() + static_cast<size_t>(num_ranks) * shape.bytes;
  }
  __device__ __forceinline__ RouteTile tile(int source) const {
    return shape.at(dynamic_shared(), source);
  }
  // Row (or slot) of a column of the destination's layout for source's token t.
  __device__ __forceinline__ int32_t place(const RouteTile& of, int column, int t) const {
    const int32_t start = column >= num_ranks ? experts.start(column - num_ranks) : 0;
    return start + of.place(column, t);
  }
  // Row of this rank that carries source's token t for one of this rank's experts.
  __device__ __forceinline__ int32_t row(const RouteTile& of, int expert, int t) const {
    return place(of, by_token ? rank : num_ranks + expert, t);
  }
  // Tokens of source in a column.
  __device__ __forceinline__ int32_t count(int source, int column, int32_t total) const {
    const int32_t end = source + 1 < num_ranks ? tile(source + 1).base(column) : total;
    return end - tile(source).base(column);
  }
};

// Totals that do not belong to an expert, in shared memory.
struct RouteTotals {
  int32_t rank[kMaxLinkRanks];  // tokens that go to a rank
  int32_t rows;                 // of layout kExpert: end of the last group of this rank
};

template <class Link>
__device__ __forceinline__ const uint64_t* ids_of(const SmallDispatchArgs& args, uint64_t epoch,
                                                  int source) {
  return sent_ids<Link>(args.link, args.small, epoch, source);
}

// What can be done before there are ids, by the whole block: no token goes anywhere yet. A barrier
// must follow before mark_group.
__device__ __forceinline__ void prepare_route(const SmallDispatchArgs& args,
                                              const GroupRoute& route) {
  const PlaceArgs& place = args.place;
  route.experts.load_owners(place.experts);
  if (place.layout == Layout::kPadded)
#pragma unroll 1
    for (int e = thread_index(); e < place.dims.num_experts; e += kSmallThreads)
      route.experts.start(e) = place.experts.local[e] * route.num_ranks * args.small.max_tokens;
#pragma unroll 1
  for (int s = 0; s < route.num_ranks; ++s)
#pragma unroll 1
    for (int i = thread_index(); i < route.words * route.shape.columns; i += kSmallThreads)
      route.tile(s).mask(0, i) = 0;
}

// Where it comes in between: a block that has sent, or masks of a call that was refused.
EPCOMM_SELDOM inline __device__ void prepare_route_again(const SmallDispatchArgs& args) {
  prepare_route(args, GroupRoute(args));
}

// Whose columns a block needs: to take rows, those of this rank and its experts, to write the plan
// all.
enum class RouteColumns { kOwn, kAll };

// Sets the bits of 32 of source's tokens, those of a word of its tile, by a warp. ids: [tokens, K],
// as they have been sent. Some are left out where source does not send them all, since it refuses
// the call or is in another. lost: set if a wait was given up. come() is called when ids have come.
template <class Link, class Come>
__device__ __forceinline__ void mark_ids(const SmallDispatchArgs& args, const GroupRoute& route,
                                         RouteColumns needed, uint64_t epoch, int source, int word,
                                         const uint64_t* ids, int tokens, bool& lost, Come come) {
  // Lanes take two ids at a time, side by side: of a token's ids one by one, every lane would load
  // what it has of 32 bytes four times.
  constexpr int kPairs = 4;
  const RouteTile tile = route.tile(source);
  const int topk = route.topk, count = max(min(tokens, kWarpSize), 0) * topk;
  // i / topk of i < 1024: topk is at most 32.
  const uint32_t one_topk = 65536u / static_cast<uint32_t>(topk) + 1;
#pragma unroll 1
  for (int first = 0; first < count && !lost; first += 2 * kPairs * kWarpSize) {
    auto at = [&](int i) { return first + 2 * (i / 2 * kWarpSize + lane_index()) + i % 2; };
    ulonglong2 pair[kPairs] = {};
    auto id = [&](int i) { return i % 2 == 0 ? pair[i / 2].x : pair[i / 2].y; };
    auto load = [&] {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        load_relaxed_system_if(at(2 * i) < count, pair[i],
                               reinterpret_cast<const ulonglong2*>(ids + at(2 * i)));
      bool arrived = true;
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i)
        arrived &= !Link::kMapped || at(i) >= count || TaggedWord::is_of(id(i), epoch);
      return arrived;
    };
    uint64_t begin = 0;
    for (int spin = 1; !__all_sync(kFullWarp, load()) && !lost; ++spin) {
      if (begin == 0) begin = global_time_ns();
      if (spin % kSpinsPerLook != 0) continue;
      if (Link::kMapped && link_is_doubtful(args.link, epoch, source)) return;
      lost = __any_sync(kFullWarp, gives_up(args.link, epoch, begin));
    }
    come();
    if (begin != 0 && lane_index() == 0 && args.link.statistics.max_wait_ns != nullptr)
      note_wait(args.link.statistics, source, global_time_ns() - begin);
    int owner[2 * kPairs];
    uint32_t bit[2 * kPairs];
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      const int32_t expert =
          at(i) < count && !lost ? valid_expert(args.place, static_cast<int32_t>(id(i))) : -1;
      bit[i] = 1u << (static_cast<uint32_t>(at(i)) * one_topk >> 16) % kWarpSize;
      owner[i] = expert >= 0 ? route.experts.owner(expert) : -1;
      if (needed == RouteColumns::kAll ? expert >= 0 : owner[i] == route.rank)
        atomicOr(&tile.mask(word, route.num_ranks + expert), bit[i]);
    }
    const bool all = needed == RouteColumns::kAll;
#pragma unroll 1
    for (int r = all ? 0 : route.rank; r < (all ? route.num_ranks : route.rank + 1); ++r) {
      uint32_t mask = 0;
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) mask |= owner[i] == r ? bit[i] : 0;
      mask = __reduce_or_sync(kFullWarp, mask);
      // No other warp has this word's tokens.
      if (mask != 0 && lane_index() == 0) tile.mask(word, r) |= mask;
    }
  }
}

// Masks, by the whole block: of tokens(s, later) tokens of each source s, first of the lowest
// tokens of all; later: not the first word of the warp. come() is called when ids have come, before
// there are masks. A barrier must follow before place_group. False: the warp has given up a wait
// for ids.
template <class Link, class Tokens, class Come>
__device__ __forceinline__ bool mark_group(const SmallDispatchArgs& args, const GroupRoute& route,
                                           RouteColumns needed, uint64_t epoch, Tokens tokens,
                                           Come come) {
  bool lost = false;
#pragma unroll 1
  for (int i = warp_index(); i < route.num_ranks * route.words && !lost; i += kSmallWarps) {
    const int word = i / route.num_ranks, s = i - word * route.num_ranks, t = word * kWarpSize;
    mark_ids<Link>(args, route, needed, epoch, s, word,
                   ids_of<Link>(args, epoch, s) + int64_t{t} * route.topk,
                   tokens(s, i >= kSmallWarps) - t, lost, come);
  }
  return !lost;
}

// Starts of the experts' groups, where each begins behind the one before, by the whole block.
// route: a copy, that what calls this keeps its own in registers. Ends with a barrier.
EPCOMM_SELDOM inline __device__ void line_up_experts(const SmallDispatchArgs& args,
                                                     GroupRoute route, RouteColumns needed,
                                                     bool writes, RouteTotals& totals) {
  const int num_ranks = route.num_ranks;
#pragma unroll 1
  for (int r = warp_index(); r < num_ranks; r += kSmallWarps) {
    const bool reports = writes && r == route.rank;
    if (route.by_token && !reports) continue;
    if (needed == RouteColumns::kOwn && r != route.rank) continue;
    const int32_t end =
        line_up_groups(route.experts, r, args.expert_alignment, [&](int e, int32_t start) {
          if (!route.by_token) route.experts.start(e) = start;
          if (reports) args.place.plan.expert_offset[args.place.experts.local[e]] = start;
        });
    if (lane_index() != 0) continue;
    if (r == route.rank) totals.rows = end;
    if (reports) args.place.plan.expert_offset[args.place.dims.local_experts] = end;
  }
  __syncthreads();
}

// From the masks: bases and starts, by the whole block. writes: this block writes the plan's
// offsets. Ends with a barrier.
__device__ __forceinline__ void place_group(const SmallDispatchArgs& args, const GroupRoute& route,
                                            RouteColumns needed, bool writes, RouteTotals& totals) {
  const int num_ranks = route.num_ranks, columns = route.shape.columns;
#pragma unroll 1
  for (int column = thread_index(); column < columns; column += kSmallThreads) {
    const int owner = column < num_ranks ? column : route.experts.owner(column - num_ranks);
    if (needed == RouteColumns::kOwn && owner != route.rank) continue;
    int32_t total = 0;
#pragma unroll 1
    for (int s = 0; s < num_ranks; ++s) {
      const RouteTile tile = route.tile(s);
      tile.base(column) = total;
      total += tile.fill_prefixes(column);
    }
    if (column < num_ranks) {
      totals.rank[column] = total;
      continue;
    }
    route.experts.total(column - num_ranks) = total;
  }
  __syncthreads();
  if (args.place.layout == Layout::kPadded) return;
  line_up_experts(args, route, needed, writes, totals);
}

// What this rank receives, for a host that waits for it; by a block. route: as of line_up_experts.
EPCOMM_SELDOM inline __device__ void tell_totals(const SmallDispatchArgs& args, GroupRoute route,
                                                 const RouteTotals& totals) {
  auto tell = [&](int i, int32_t total) {
    args.totals[i] = args.link.token << 32 | static_cast<uint32_t>(total);
  };
  if (thread_index() == 0) tell(0, totals.rank[route.rank]);
#pragma unroll 1
  for (int e = thread_index(); e < args.place.dims.num_experts; e += kSmallThreads)
    if (route.experts.owner(e) == route.rank)
      tell(1 + args.place.experts.local[e], route.experts.total(e));
}

// The plan's counts, by a team.
__device__ __forceinline__ void write_counts(const SmallDispatchArgs& args, const SmallTeam& team,
                                             const GroupRoute& route, const RouteTotals& totals) {
  const PlanView& plan = args.place.plan;
  const int num_ranks = route.num_ranks, num_experts = args.place.dims.num_experts;
#pragma unroll 1
  for (int i = team.spread_thread(13); i < num_ranks * num_ranks; i += team.threads()) {
    const int s = i / num_ranks, r = i - s * num_ranks;
    plan.rank_count[i] = route.count(s, r, totals.rank[r]);
  }
#pragma unroll 1
  for (int i = team.spread_thread(14); i < num_ranks * num_experts; i += team.threads()) {
    const int s = i / num_experts, e = i - s * num_experts;
    plan.expert_count[i] = route.count(s, num_ranks + e, route.experts.total(e));
  }
  const bool padded = args.place.layout == Layout::kPadded;
#pragma unroll 1
  for (int e = team.spread_thread(12); e < num_experts; e += team.threads()) {
    if (route.experts.owner(e) != route.rank) continue;
    const int local = args.place.experts.local[e];
    plan.tokens_per_expert[local] = route.experts.total(e);
    if (padded) plan.expert_offset[local] = route.experts.start(e);
  }
  if (team.thread() != 0) return;
  *plan.num_recv = totals.rank[route.rank];
  const int local_experts = args.place.dims.local_experts;
  if (padded) plan.expert_offset[local_experts] = local_experts * num_ranks * args.small.max_tokens;
}

// Where the tokens of this rank go: plan.row, slot and first_row, by a team, a warp a
// token. agreed: else nothing is sent.
template <class Link>
__device__ __forceinline__ void write_places(const SmallDispatchArgs& args, const SmallTeam& team,
                                             const GroupRoute& route, uint64_t epoch, bool agreed) {
  const PlanView& plan = args.place.plan;
  const uint64_t* ids = ids_of<Link>(args, epoch, route.rank);
  const RouteTile own = route.tile(route.rank);
  const int lane = lane_index(), topk = route.topk, num_ranks = route.num_ranks;
#pragma unroll 1
  for (int t = team.spread_warp(8); t < args.num_tokens; t += team.warps()) {
    // What routing has read; another block may still be writing plan.topk_idx.
    const int32_t expert =
        agreed && lane < topk ? valid_expert(args.place, static_cast<int32_t>(ids[t * topk + lane]))
                              : -1;
    const int owner = expert >= 0 ? route.experts.owner(expert) : -1;
    const int32_t row =
        expert >= 0 ? route.place(own, route.by_token ? owner : num_ranks + expert, t) : -1;
    if (lane < topk) plan.row[t * topk + lane] = row;
    int32_t first_row = -1;  // at rank `lane`: of the token's first slot there
#pragma unroll 1
    for (int k = topk - 1; k >= 0; --k) {
      const int32_t at = __shfl_sync(kFullWarp, row, k);
      if (__shfl_sync(kFullWarp, owner, k) == lane) first_row = at;
    }
    if (lane >= num_ranks) continue;
    plan.slot[t * num_ranks + lane] = own.has(lane, t) ? route.place(own, lane, t) : -1;
    if (!route.by_token) plan.first_row[t * num_ranks + lane] = first_row;
  }
}

}  // namespace epcomm
