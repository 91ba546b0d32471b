// Place: the receive side of a dispatch. Copies each received token to the rows of the layout that
// carry it, its record to the plan, and its expert ids and weights to the outputs.
//
// Buffers: source[s] (the tokens of source s, packed in order) or the gathered batches are read;
// recv_x, recv_scales, recv_topk_idx, recv_topk_weights and plan.recv_meta are written. Counts come
// from plan.rank_count, or the announcements: the host need not know them.
// Launch: one block per SM; a warp takes a part of a row, reads it once and stores it to every
// distinct row. Clearing: a grid-stride loop over words; the gap behind an expert's rows by a
// block. Memory order: none between threads, each byte is written by one. The rows have arrived
// before the kernel starts: the stream, or the acquire of whoever waited for the senders, says so.
#include <algorithm>

#include "kernels/device.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/mark.cuh"
#include "kernels/place.cuh"
#include "kernels/rows.cuh"
#include "kernels/statistics.cuh"

namespace epcomm {
namespace {

static_assert(sizeof(GatheredArgs) <= kMaxKernelArgs);

// The payload is in the first row that carries the token: copies it to the others.
__device__ __forceinline__ uint32_t duplicate_payload(const PlaceArgs& args, const RowJob& job,
                                                      int32_t row) {
  const uint32_t firsts = distinct_rows(row);
  uint32_t others = firsts;
  if (firsts == 0) return 0;
  const int64_t first = __shfl_sync(kFullWarp, row, take_lowest(others));
  if (others == 0) return firsts;
  const char* from = args.recv_x + first * args.rows.row_bytes;
  Batch batch;
  batch.load(from, job.begin + lane_index(), job.end);
  copy_payload(args, job, from, row, others, batch);
  if (job.leads && args.rows.scale_bytes != 0)
    place_scales(args, args.recv_scales + first * args.rows.scale_bytes, row, others);
  return firsts;
}

// Sets entries [begin, end) of the outputs to "none", by threads first, first + step, ...
__device__ __forceinline__ void clear_entries(const PlaceArgs& args, int64_t begin, int64_t end,
                                              int64_t first, int64_t step) {
  if (begin >= end) return;
  const int words = static_cast<int>(args.index_type) / 4;
  if (args.recv_topk_idx != nullptr)
    fill_words(static_cast<uint32_t*>(args.recv_topk_idx) + begin * words, (end - begin) * words,
               0xffffffffu, first, step);  // -1, of either size
  if (args.recv_topk_weights != nullptr)
    fill_words(reinterpret_cast<uint32_t*>(args.recv_topk_weights) + begin, end - begin, 0, first,
               step);  // 0.0f
}

// The entries that no token has, by the whole grid.
__device__ __forceinline__ void clear_rest(const PlaceArgs& args) {
  if (!args.clears || args.chunk != 0) return;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  if (args.layout == Layout::kToken) {
    const int64_t topk = args.dims.topk;
    clear_entries(args, *args.plan.num_recv * topk, args.recv_capacity * topk, thread, threads);
    return;
  }
  const int experts = args.dims.local_experts;
  for (int e = static_cast<int>(blockIdx.x); e < experts; e += static_cast<int>(gridDim.x))
    clear_entries(args, args.plan.expert_offset[e] + args.plan.tokens_per_expert[e],
                  min(args.plan.expert_offset[e + 1], args.row_capacity), thread_index(),
                  blockDim.x);
  clear_entries(args, args.plan.expert_offset[experts], args.row_capacity, thread, threads);
}

__global__ void __launch_bounds__(kRowThreads, 1)
    place_kernel(const __grid_constant__ PlaceArgs args) {
  EPCOMM_SHARED(SourceRanges, ranges);
  make_mark(args.mark);
  const int num_ranks = args.dims.num_ranks, topk = args.dims.topk, lane = lane_index();
  ranges.fill(num_ranks, [&](int s) { return chunk_of_source(args, s); });
  clear_rest(args);

  const MetaLayout meta(topk);
  const RowJobs jobs(ranges.end[num_ranks - 1], args.rows.row_bytes);
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int s = ranges.source(job.row, num_ranks);
    const PackTarget& source = args.source[s];
    const bool by_token = args.layout == Layout::kToken, in_place = source.x == nullptr;
    if (in_place && by_token && !job.leads) continue;
    const int32_t n = job.row + ranges.to_recv[s];
    if (n >= args.recv_capacity) continue;
    const int64_t i = job.row + ranges.to_source[s];
    void* record =
        source.meta == nullptr ? meta.row(args.plan.recv_meta, n) : meta.row(source.meta, i);
    TokenSlots slots;
    if (lane < topk) slots.row = valid_row(args, meta.row(record, 0)[lane]);
    uint32_t firsts;
    if (!in_place)
      firsts = place_payload(args, job, source.x + i * args.rows.row_bytes, slots.row);
    else
      firsts = by_token ? distinct_rows(slots.row) : duplicate_payload(args, job, slots.row);
    if (!job.leads) continue;
    if (source.scales != nullptr && args.rows.scale_bytes != 0)
      place_scales(args, source.scales + i * args.rows.scale_bytes, slots.row, firsts);
    if (lane < topk) {
      slots.expert = valid_expert(args, meta.topk_idx(record, 0)[lane]);
      slots.weight = meta.topk_weights(record, 0)[lane];
    }
    slots.token = *meta.token(record, 0);
    void* kept = meta.row(args.plan.recv_meta, n);
    if (kept != record)
      write_record(meta, kept, slots, true);
    else if (lane < topk)
      meta.row(kept, 0)[lane] = slots.row;  // combine trusts the plan's records
    place_outputs(args, n, slots, (firsts >> lane & 1) != 0);
  }
}

__global__ void __launch_bounds__(kRowThreads, 1)
    place_gathered_kernel(const __grid_constant__ GatheredArgs args) {
  EPCOMM_SHARED(SourceRanges, ranges);
  const PlaceArgs& place = args.place;
  make_mark(place.mark);
  const int num_ranks = place.dims.num_ranks, topk = place.dims.topk, lane = lane_index();
  const AnnounceLayout announce{num_ranks, place.dims.num_experts};
  ranges.fill(num_ranks, [&](int s) {
    const int32_t tokens =
        args.announced[int64_t{s} * announce.words() + AnnounceLayout::kNumTokens];
    return SourceCount{0, min(tokens, args.capacity), 0};
  });
  clear_rest(place);

  const MetaLayout meta(topk);
  const RowJobs jobs(ranges.end[num_ranks - 1], place.rows.row_bytes);
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int s = ranges.source(job.row, num_ranks);
    const int32_t t = job.row + ranges.to_source[s];
    const int64_t entry = int64_t{s} * args.capacity + t;
    const int32_t n = args.slot[entry * num_ranks + place.rank];
    if (n < 0 || n >= place.recv_capacity) continue;
    TokenSlots slots;
    if (lane < topk) {
      const int32_t expert = valid_expert(place, args.topk_idx[entry * topk + lane]);
      if (expert >= 0 && place.experts.rank[expert] == place.rank)
        slots.row = valid_row(place, args.row[entry * topk + lane]);
    }
    const uint32_t firsts =
        place_payload(place, job, args.x + entry * place.rows.row_bytes, slots.row);
    if (!job.leads) continue;
    if (args.scales != nullptr && place.rows.scale_bytes != 0)
      place_scales(place, args.scales + entry * place.rows.scale_bytes, slots.row, firsts);
    const bool weighted = args.topk_weights != nullptr;
    if (lane < topk) {
      slots.expert = valid_expert(place, args.topk_idx[entry * topk + lane]);
      if (weighted) slots.weight = args.topk_weights[entry * topk + lane];
    }
    slots.token = t;
    write_record(meta, meta.row(place.plan.recv_meta, n), slots, weighted);
    place_outputs(place, n, slots, (firsts >> lane & 1) != 0);
  }
}

// words of 4 bytes, all set to value.
struct ClearArgs {
  uint32_t* index;
  int64_t index_words;
  uint32_t* weights;
  int64_t weight_words;
};

__global__ void __launch_bounds__(256) clear_kernel(const ClearArgs args) {
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  fill_words(args.index, args.index_words, 0xffffffffu, first, step);  // -1, of either size
  fill_words(args.weights, args.weight_words, 0, first, step);         // 0.0f
}

__global__ void __launch_bounds__(256)
    count_received_kernel(const Statistics statistics, const int32_t* tokens, int local_experts) {
  const int e = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (e < local_experts) add_received(statistics, e, tokens[e]);
}

void check_place(const PlaceArgs& args) {
  check_aligned(args.recv_x, "recv_x");
  for (int s = 0; s < args.dims.num_ranks; ++s) check_aligned(args.source[s].x, "received payload");
}

}  // namespace

void launch_clear_outputs(const PlaceArgs& args, cudaStream_t stream) {
  const int64_t entries = args.layout == Layout::kToken
                              ? int64_t{args.recv_capacity} * args.dims.topk
                              : int64_t{args.row_capacity};
  ClearArgs clear = {};
  if (args.recv_topk_idx != nullptr) {
    clear.index = static_cast<uint32_t*>(args.recv_topk_idx);
    clear.index_words = entries * (static_cast<int64_t>(args.index_type) / 4);
  }
  if (args.recv_topk_weights != nullptr) {
    clear.weights = reinterpret_cast<uint32_t*>(args.recv_topk_weights);
    clear.weight_words = entries;
  }
  const int64_t words = clear.index_words + clear.weight_words;
  if (words == 0) return;
  constexpr int64_t kWordsPerBlock = 4096;
  const int64_t blocks =
      std::min<int64_t>((words + kWordsPerBlock - 1) / kWordsPerBlock, 2 * persistent_blocks(0));
  launch("launch of clear_outputs", clear_kernel, {static_cast<int>(blocks), 256}, stream, clear);
}

void launch_place(const PlaceArgs& args, int num_sms, cudaStream_t stream) {
  check_place(args);
  if (args.recv_capacity == 0 && !args.clears) {
    launch_mark(args.mark, stream);
    return;
  }
  launch("launch of place", place_kernel, {persistent_blocks(num_sms), kRowThreads}, stream, args);
}

void launch_count_received(const Statistics& statistics, const int32_t* tokens_per_expert,
                           int local_experts, cudaStream_t stream) {
  if (local_experts == 0) return;
  launch("launch of count_received", count_received_kernel, {(local_experts + 255) / 256, 256},
         stream, statistics, tokens_per_expert, local_experts);
}

void launch_place_gathered(const GatheredArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.place.recv_x, "recv_x");
  check_aligned(args.x, "gathered x");
  if ((args.place.recv_capacity == 0 && !args.place.clears) || args.capacity == 0) {
    launch_mark(args.place.mark, stream);
    return;
  }
  launch("launch of place_gathered", place_gathered_kernel,
         {persistent_blocks(num_sms), kRowThreads}, stream, args);
}

}  // namespace epcomm
