// Route: from expert ids to counts, slots and rows. Two steps with an exchange of announcements
// between them. A block handles a tile of 256 tokens (kernels/route_tile.cuh).
//
// Buffers: topk_idx [T, K] in. count writes plan.topk_idx, tile_count [tiles, R + E] and announce.
// assign reads those and announced [R, words], and writes the rest of the plan. The
// first word of a tile's counts also has, in its upper half, 1 + the place in the tile of its first
// bad id.
// Launch: one block per tile, at least one (T = 0 is announced, too). With several tiles a second
// small kernel adds their counts up; no counter outlives a kernel, so a graph can replay them.
// Memory order: kernels of one stream in order. Announcements have arrived before assign starts.
#include <algorithm>
#include <string>

#include "kernels/device.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/mark.cuh"
#include "kernels/route_tile.cuh"

namespace epcomm {
namespace {

static_assert(sizeof(RouteKernelArgs) <= 4096);

constexpr int kThreads = 512;
constexpr int kSlices = kThreads / kTileTokens;  // warps that share the slots of one word's tokens
constexpr int kCountBits = 16;  // of the first word of a tile's counts; the bad id is above
constexpr int32_t kNoBadId = 0x7fffffff;
static_assert(kThreads % kTileTokens == 0);
static_assert(kTileTokens < 1 << kCountBits && kTileTokens * kMaxTopk < 1 << (31 - kCountBits));

// Shared memory of a block: a tile, then what is known of the experts.
__host__ __device__ size_t shared_bytes(const Dims& dims) {
  return RouteTile(dims, kTileWords).bytes + RouteExperts(dims).bytes();
}
struct BlockTile {
  RouteTile tile;
  RouteExperts experts;

  __device__ explicit BlockTile(const Dims& dims)
      : tile(RouteTile(dims, kTileWords).at(dynamic_shared(), 0)), experts(dims) {
    experts.memory = dynamic_shared() + tile.bytes;
  }
  // Before the barrier that mark needs.
  __device__ __forceinline__ void prepare(const RouteKernelArgs& args) const {
    for (int i = thread_index(); i < kTileWords * tile.columns; i += kThreads) tile.mask(0, i) = 0;
    experts.load_owners(args.experts);
  }
  // Sets the masks. id(t, k) gives the expert of a slot of the batch, -1 = none. By the whole
  // block.
  template <class Id>
  __device__ __forceinline__ void mark(const RouteKernelArgs& args, Id id) const {
    const int word = warp_index() % kTileWords;
    const int64_t t = int64_t{blockIdx.x} * kTileTokens + word * kWarpSize + lane_index();
    mark_word(tile, experts, word, warp_index() / kTileWords, kSlices, args.dims.topk,
              [&](int k) { return t < args.num_tokens ? id(t, k) : -1; });
  }
};

__device__ __forceinline__ int64_t load_id(const RouteKernelArgs& args, int64_t i) {
  return args.index_type == IndexType::kInt32
             ? int64_t{static_cast<const int32_t*>(args.topk_idx)[i]}
             : static_cast<const int64_t*>(args.topk_idx)[i];
}

// Adds one column up over the tiles and announces it. Column 0 also has the header.
__device__ __forceinline__ void announce_column(const RouteKernelArgs& args, int column) {
  const int num_ranks = args.dims.num_ranks, columns = num_ranks + args.dims.num_experts;
  const int tiles = (args.num_tokens + kTileTokens - 1) / kTileTokens;
  const AnnounceLayout layout{num_ranks, args.dims.num_experts};
  constexpr int32_t kCountMask = (1 << kCountBits) - 1;
  int32_t total = 0, bad_position = 0;  // 1 + position
  for (int c = 0; c < kMaxChunks; ++c) {
    int32_t count = 0;
    if (c < args.chunks) {
      const int begin = chunk_tile(tiles, args.chunks, c);
      const int end = chunk_tile(tiles, args.chunks, c + 1);
      for (int i = begin; i < end; ++i) {
        const int32_t word = args.tile_count[int64_t{i} * columns + column];
        count += word & kCountMask;
        if (bad_position == 0 && word >> kCountBits != 0)
          bad_position = i * kTileTokens * args.dims.topk + (word >> kCountBits);
      }
    }
    total += count;
    if (column < num_ranks) args.announce[layout.chunk_count(c) + column] = count;
  }
  // expert_count follows rank_count as the experts' columns follow the ranks'.
  args.announce[layout.rank_count() + column] = total;
  if (column != 0) return;
  int64_t bad_value = bad_position == 0 ? 0 : load_id(args, bad_position - 1);
  bad_value = max(min(bad_value, int64_t{INT32_MAX}), int64_t{INT32_MIN});
  if (bad_position != 0 && args.bad_index != nullptr) {
    args.bad_index[1] = static_cast<int32_t>(bad_value);
    args.bad_index[2] = args.dims.topk;
    __threadfence_system();  // the host takes the position as the sign that the rest is there
    args.bad_index[0] = bad_position;
  }
  args.announce[AnnounceLayout::kNumTokens] = args.num_tokens;
  args.announce[AnnounceLayout::kBadIndex] = bad_position;
  args.announce[AnnounceLayout::kBadValue] = static_cast<int32_t>(bad_value);
  constexpr int kSignatureEnd = AnnounceLayout::kSignature + AnnounceLayout::kSignatureWords;
  for (int i = 0; i < AnnounceLayout::kSignatureWords; ++i)
    args.announce[AnnounceLayout::kSignature + i] = args.signature[i];
  // Padding: what travels is the same in every run.
  for (int i = kSignatureEnd; i < AnnounceLayout::kHeaderWords; ++i) args.announce[i] = 0;
  for (int i = layout.rank_count() + columns; i < layout.words(); ++i) args.announce[i] = 0;
}

__global__ void __launch_bounds__(kThreads, 1)
    count_kernel(const __grid_constant__ RouteKernelArgs args) {
  EPCOMM_SHARED(int32_t, first_bad);
  make_mark(args.mark);
  const BlockTile block(args.dims);
  const RouteTile& tile = block.tile;
  const int topk = args.dims.topk, num_experts = args.dims.num_experts;
  block.prepare(args);
  if (thread_index() == 0) first_bad = kNoBadId;
  __syncthreads();
  const int64_t tile_begin = int64_t{blockIdx.x} * kTileTokens;
  block.mark(args, [&](int64_t t, int k) {
    const int64_t id = load_id(args, t * topk + k);
    const bool good = id >= -1 && id < num_experts;
    if (!good) atomicMin(&first_bad, static_cast<int32_t>((t - tile_begin) * topk + k));
    const int32_t expert = good ? static_cast<int32_t>(id) : -1;
    args.plan.topk_idx[t * topk + k] = expert;
    return expert;
  });
  __syncthreads();
  for (int column = thread_index(); column < tile.columns; column += kThreads) {
    int32_t count = 0;
#pragma unroll
    for (int word = 0; word < kTileWords; ++word) count += __popc(tile.mask(word, column));
    if (column == 0 && first_bad != kNoBadId) count |= (first_bad + 1) << kCountBits;
    // tile_count has no row for the empty batch.
    if (tile_begin < args.num_tokens)
      args.tile_count[int64_t{blockIdx.x} * tile.columns + column] = count;
    // Reads back only what this thread has just written.
    if (gridDim.x == 1) announce_column(args, column);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    announce_kernel(const __grid_constant__ RouteKernelArgs args) {
  const int column = static_cast<int>(blockIdx.x) * kThreads + thread_index();
  if (column < args.dims.num_ranks + args.dims.num_experts) announce_column(args, column);
}

// Tokens of earlier tiles of this rank in a column.
__device__ __forceinline__ int32_t earlier_tiles(const RouteKernelArgs& args, int columns,
                                                 int column) {
  int32_t sum = 0;
  for (int i = 0; i < static_cast<int>(blockIdx.x); ++i)
    sum += args.tile_count[int64_t{i} * columns + column] & ((1 << kCountBits) - 1);
  return sum;
}

// A count that was announced, kept in range: an exchange that was cut short leaves anything.
__device__ __forceinline__ int32_t valid_count(const RouteKernelArgs& args, int32_t count) {
  return min(max(count, 0), args.max_tokens);
}

// base of the ranks. The first block also fills rank_count and num_recv.
__device__ __forceinline__ void rank_bases(const RouteKernelArgs& args, const RouteTile& tile) {
  const int num_ranks = tile.num_ranks;
  const AnnounceLayout layout{num_ranks, args.dims.num_experts};
  const int32_t* counts = args.announced + layout.rank_count();
  const int64_t stride = layout.words();
  for (int r = thread_index(); r < num_ranks; r += kThreads) {
    int32_t before = 0, total = 0;
    for (int s = 0; s < num_ranks; ++s) {
      const int32_t count = valid_count(args, counts[s * stride + r]);
      if (s < args.rank) before += count;
      total += count;
      if (blockIdx.x == 0) args.plan.rank_count[s * num_ranks + r] = count;
    }
    tile.base(r) = before + earlier_tiles(args, tile.columns, r);
    if (blockIdx.x == 0 && r == args.rank) *args.plan.num_recv = total;
  }
}

// base and total of the experts, groups not yet lined up. The first block also fills expert_count
// and tokens_per_expert, and expert_offset of layout kPadded.
__device__ __forceinline__ void expert_bases(const RouteKernelArgs& args, const BlockTile& block) {
  const RouteTile& tile = block.tile;
  const int num_ranks = tile.num_ranks, num_experts = args.dims.num_experts;
  const AnnounceLayout layout{num_ranks, num_experts};
  const int32_t* counts = args.announced + layout.expert_count();
  const int64_t padded_rows = int64_t{num_ranks} * args.max_tokens;
  const bool padded = args.layout == Layout::kPadded;
  for (int e = thread_index(); e < num_experts; e += kThreads) {
    int32_t before = 0, total = 0;
    for (int s = 0; s < num_ranks; ++s) {
      const int32_t count = valid_count(args, counts[int64_t{s} * layout.words() + e]);
      if (s < args.rank) before += count;
      total += count;
      if (blockIdx.x == 0) args.plan.expert_count[int64_t{s} * num_experts + e] = count;
    }
    const int local = args.experts.local[e];
    const int32_t start = padded ? static_cast<int32_t>(local * padded_rows) : 0;
    block.experts.total(e) = total;
    if (args.layout != Layout::kToken)
      tile.base(num_ranks + e) = start + before + earlier_tiles(args, tile.columns, num_ranks + e);
    if (blockIdx.x == 0 && args.experts.rank[e] == args.rank) {
      args.plan.tokens_per_expert[local] = total;
      if (padded) args.plan.expert_offset[local] = start;
    }
  }
  if (padded && blockIdx.x == 0 && thread_index() == 0)
    args.plan.expert_offset[args.dims.local_experts] =
        static_cast<int32_t>(args.dims.local_experts * padded_rows);
}

// Groups follow each other in layout kExpert. The first block fills expert_offset.
__device__ __forceinline__ void place_groups(const RouteKernelArgs& args, const BlockTile& block,
                                             int owner) {
  const bool reports = blockIdx.x == 0 && owner == args.rank;
  const int32_t end =
      line_up_groups(block.experts, owner, args.expert_alignment, [&](int e, int32_t start) {
        if (args.layout == Layout::kExpert) block.tile.base(block.tile.num_ranks + e) += start;
        if (reports) args.plan.expert_offset[args.experts.local[e]] = start;
      });
  if (reports && lane_index() == 0) args.plan.expert_offset[args.dims.local_experts] = end;
}

__global__ void __launch_bounds__(kThreads, 1)
    assign_kernel(const __grid_constant__ RouteKernelArgs args) {
  make_mark(args.mark);
  const BlockTile block(args.dims);
  const RouteTile& tile = block.tile;
  const int topk = args.dims.topk;
  block.prepare(args);
  rank_bases(args, tile);
  expert_bases(args, block);
  __syncthreads();
  if (args.layout != Layout::kPadded)
    for (int r = warp_index(); r < tile.num_ranks; r += kThreads / kWarpSize)
      if (args.layout == Layout::kExpert || (blockIdx.x == 0 && r == args.rank))
        place_groups(args, block, r);
  block.mark(args, [&](int64_t t, int k) { return args.plan.topk_idx[t * topk + k]; });
  __syncthreads();
  for (int column = thread_index(); column < tile.columns; column += kThreads)
    tile.fill_prefixes(column);
  __syncthreads();
  const int64_t tile_begin = int64_t{blockIdx.x} * kTileTokens;
  const int tokens = static_cast<int>(min(args.num_tokens - tile_begin, int64_t{kTileTokens}));
  const int32_t* ids = args.plan.topk_idx + tile_begin * topk;
  PlaceWriter{args.layout, topk, args.plan, tile_begin}.write(
      tile, block.experts, tokens, thread_index(), kThreads, [&](int i) { return ids[i]; },
      [&](int column, int t) { return tile.place(column, t); });
}

LaunchShape tile_shape(const RouteKernelArgs& args) {
  if (args.dims.num_ranks > kMaxPackRanks)
    throw Error("num_ranks is " + std::to_string(args.dims.num_ranks) +
                "; the GPU transports route between at most " + std::to_string(kMaxPackRanks));
  const size_t bytes = shared_bytes(args.dims);
  constexpr size_t kAlwaysThere = 48 << 10;
  if (bytes > kAlwaysThere) {
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (bytes > static_cast<size_t>(most))
      throw Error("num_experts is " + std::to_string(args.dims.num_experts) + ": routing needs " +
                  std::to_string(bytes) + " bytes of shared memory per block and this GPU has " +
                  std::to_string(most) + "; use fewer experts");
  }
  return {std::max(num_tiles(args.num_tokens), 1), kThreads, bytes};
}

}  // namespace

void launch_count(const RouteKernelArgs& args, cudaStream_t stream) {
  const LaunchShape shape = tile_shape(args);
  launch("launch of count", count_kernel, shape, stream, args);
  if (shape.blocks == 1) return;
  const int columns = args.dims.num_ranks + args.dims.num_experts;
  launch("launch of announce", announce_kernel, {(columns + kThreads - 1) / kThreads, kThreads},
         stream, args);
}

void launch_assign(const RouteKernelArgs& args, cudaStream_t stream) {
  launch("launch of assign", assign_kernel, tile_shape(args), stream, args);
}

}  // namespace epcomm
