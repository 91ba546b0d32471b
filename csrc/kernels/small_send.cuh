// What the blocks that send do in the dispatch of a small batch (kernels/small_dispatch.cuh).
#pragma once

#include "kernels/device.cuh"
#include "kernels/link.cuh"
#include "kernels/small.cuh"
#include "kernels/small.h"
#include "kernels/small_quant.cuh"
#include "kernels/small_staging.cuh"

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

// Stores slot i of this rank's ids and weights to all ranks, or, where the link does not map them,
// to this rank's own window. expert: -1 = none.
template <class Link>
__device__ __forceinline__ void store_slot(const SmallDispatchArgs& args, uint64_t epoch, int i,
                                           int32_t expert, float weight) {
  const LinkArgs& link = args.link;
  const size_t ids = args.small.source_ids(link.rank, epoch);
  const size_t weights = args.small.source_weights(link.rank, epoch);
#pragma unroll 1
  for (int n = 0, r = link.rank; n < (Link::kMapped ? link.num_ranks : 1); ++n) {
    char* window = link.window[r];
    r = r + 1 < link.num_ranks ? r + 1 : 0;
    store_tagged(window + ids, i, epoch, static_cast<uint32_t>(expert));
    if (args.topk_weights != nullptr)
      store_tagged(window + weights, i, epoch, __float_as_uint(weight));
  }
}

// The ids and weights of the tokens of this block, by its warps, a token each, ahead of all rows:
// what every rank routes by must not queue behind them. Where the link does not map, block 0 has
// those of all tokens. -1 for tokens that there are not.
template <class Link, class Start>
__device__ __forceinline__ void send_ids(const SmallDispatchArgs& args, const SmallBlocks& blocks,
                                         const Start& start) {
  const int topk = args.place.dims.topk, max_tokens = args.small.max_tokens;
  const BlockRows own(max_tokens, blocks.senders);
  const int count = Link::kMapped ? own.count : blockIdx.x == 0 ? max_tokens : 0;
#pragma unroll 1
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

// By block 0, where the link puts: ids and weights of all tokens, behind this rank's entry in its
// own window, and the first slot with a bad id. Ends with a barrier.
__device__ __forceinline__ void stage_slots(const SmallDispatchArgs& args, uint64_t epoch,
                                            int32_t& first_bad) {
  constexpr int kAtOnce = 4;
  const int slots = args.num_tokens * args.place.dims.topk;
  auto* words = reinterpret_cast<uint64_t*>(args.link.window[args.link.rank] +
                                            args.link.control.slots(args.link.rank, epoch));
  int32_t bad = kNoBadId;
#pragma unroll 1
  for (int begin = thread_index(); begin < slots; begin += kAtOnce * kSmallThreads) {
    // All are on their way before the first is needed.
    int64_t id[kAtOnce];
    uint32_t weight[kAtOnce] = {};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = begin + u * kSmallThreads;
      if (i < slots) id[u] = given_id(args, i);
      if (i < slots && args.topk_weights != nullptr)
        weight[u] = __float_as_uint(args.topk_weights[i]);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = begin + u * kSmallThreads;
      if (i >= slots) continue;
      const bool good = good_id(args, id[u]);
      if (!good) bad = min(bad, i);
      const int32_t expert = good ? static_cast<int32_t>(id[u]) : -1;
      if (args.fresh) args.place.plan.topk_idx[i] = expert;
      words[i] = SlotWord::of(expert, weight[u]);
    }
  }
  if (thread_index() == 0) first_bad = kNoBadId;
  __syncthreads();
  if (bad != kNoBadId) atomicMin(&first_bad, bad);
  __syncthreads();
}

// By a block: the first slot of this rank with a bad id. Ends with a barrier.
__device__ __forceinline__ void find_bad_id(const SmallDispatchArgs& args, int32_t& first_bad) {
  if (thread_index() == 0) first_bad = kNoBadId;
  __syncthreads();
#pragma unroll 1
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

// By block 0: the entry, and, where the link puts, ids and weights with it. Peers wait for it: what
// it does not say is found out afterwards.
template <class Link>
__device__ __forceinline__ void announce(const SmallDispatchArgs& args, uint64_t epoch,
                                         int32_t& first_bad) {
  const LinkArgs& link = args.link;
  const bool tells = args.bad_index == nullptr;
  if constexpr (kPuts<Link>)
    stage_slots(args, epoch, first_bad);
  else if (tells)
    find_bad_id(args, first_bad);
  EntryNews news;
  if (tells && first_bad != kNoBadId) news = {0, first_bad + 1, bad_id(args, first_bad)};
  link_announce<Link>(
      link, epoch, nullptr, 0, news,
      static_cast<size_t>(args.num_tokens * args.place.dims.topk) * sizeof(uint64_t));
  if (!kPuts<Link> && !tells) find_bad_id(args, first_bad);
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
  // Bit i is rank (i + this one) % 32.
  static_assert(kMaxLinkRanks == 32);
  const auto rank = static_cast<uint32_t>(link.rank);
#pragma unroll 1
  for (auto rest = static_cast<uint32_t>((uint64_t{ranks} << 32 | ranks) >> rank); rest != 0;)
    to(link.window[(static_cast<uint32_t>(take_lowest(rest)) + rank) % kMaxLinkRanks]);
}

// Scales that were passed in: whole words, whatever their address.
__device__ __forceinline__ void send_scales(const SmallDispatchArgs& args, int t, size_t slot,
                                            uint32_t ranks) {
  const int row_bytes = args.place.rows.row_bytes, scale_bytes = args.place.rows.scale_bytes;
  if (scale_bytes == 0) return;
  const char* from = args.scales + int64_t{t} * scale_bytes;
#pragma unroll 1
  for (int begin = lane_index() * 4; begin < scale_bytes; begin += kWarpSize * 4) {
    uint32_t word = 0;
    if (reinterpret_cast<uintptr_t>(from) % 4 == 0 && begin + 4 <= scale_bytes) {
      word = *reinterpret_cast<const uint32_t*>(from + begin);
    } else {
#pragma unroll 1
      for (int b = 0; b < 4 && begin + b < scale_bytes; ++b)
        word |= static_cast<uint32_t>(static_cast<uint8_t>(from[begin + b])) << 8 * b;
    }
    for_ranks(args.link, ranks, [&](char* window) {
      *reinterpret_cast<uint32_t*>(window + slot + row_bytes + begin) = word;
    });
  }
}

// Where the link puts: the ranks that each token of this block goes to, one bit each, from before
// it is stored to when it is put.
__device__ __forceinline__ uint32_t* kept_destinations() {
  EPCOMM_SHARED(uint32_t[kTileTokens], ranks);
  return ranks;
}

// Uses the shared memory of routing, which begins after the next barrier. Start: LinkStart, which
// is looked at only when the first row has been asked for. Nothing is sent if the link is lost.
// before(): sends what goes ahead of the rows, while the first is on its way.
template <class Link, Quant kQuant, Dtype kDtype, class Start, class Before>
__device__ __forceinline__ void send_rows(const SmallDispatchArgs& args, const BlockRows& own,
                                          const Start& start, Before before) {
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
  Rows batch;
  auto load = [&](const RowJob& job, int at) {
    batch.load(args.x + int64_t{own.at(job.row)} * x_bytes, at + lane_index(), job.end);
  };
  if (jobs.first < jobs.count) load(jobs.at(jobs.first), jobs.at(jobs.first).begin);
  before();
#pragma unroll 1
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
#pragma unroll 1
    for (int at = job.begin; at < job.end; at += Rows::kStep) {
      const int v = at + lane_index();
      if (j != jobs.first || at != job.begin) load(job, at);
      // The row is on its way before it is known where it goes.
      if (at == job.begin) {
        ranks = Link::kMapped ? destinations(args, t) : 1u << link.rank;
        if (kPuts<Link> && job.leads)
          if (const uint32_t to = destinations(args, t); lane_index() == 0)
            kept_destinations()[t] = to;
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
  const bool sent = (kept_destinations()[t] >> peer & 1) != 0;
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

}  // namespace
}  // namespace epcomm
