// Route: from expert ids to counts, slots and rows. Two steps with an exchange of announcements
// between them. A block handles a tile of 256 tokens: for every destination rank and expert it has
// a mask of the tile's tokens in shared memory. Setting a bit twice changes nothing, so duplicates
// count once, and the number of lower bits is a token's place, so results do not depend on the
// order of threads.
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

namespace epcomm {
namespace {

static_assert(sizeof(RouteKernelArgs) <= 4096);

constexpr int kThreads = 512;
constexpr int kSlices = kThreads / kTileTokens;  // threads that share the slots of one token
constexpr int kTileWords = kTileTokens / 32;     // words of a mask
constexpr int kIdsInFlight = 4;
constexpr int kCountBits = 16;  // of the first word of a tile's counts; the bad id is above
constexpr int32_t kNoBadId = 0x7fffffff;
static_assert(kThreads % kTileTokens == 0 && kTileTokens % kWarpSize == 0);
static_assert(kTileTokens < 1 << kCountBits && kTileTokens * kMaxTopk < 1 << (31 - kCountBits));

// Shared memory of a block. Columns: R ranks, then E experts. Arrays per word are word-major, so
// that the columns that lanes touch lie in different banks.
struct TileMemory {
  int num_ranks, columns;
  size_t base_at, total_at, bad_at, prefix_at, owner_at, bytes;

  __host__ __device__ explicit TileMemory(const Dims& dims)
      : num_ranks(dims.num_ranks), columns(dims.num_ranks + dims.num_experts) {
    const size_t n = static_cast<size_t>(columns);
    base_at = n * kTileWords * sizeof(uint32_t);
    total_at = base_at + n * sizeof(int32_t);
    bad_at = total_at + n * sizeof(int32_t);
    prefix_at = bad_at + sizeof(int32_t);
    owner_at = prefix_at + n * kTileWords;
    bytes = owner_at + static_cast<size_t>(dims.num_experts);
  }
  // Tokens 32 * word, ... of the tile that go to a column.
  __device__ uint32_t& mask(int word, int column) const {
    return reinterpret_cast<uint32_t*>(dynamic_shared())[word * columns + column];
  }
  // Of assign: place of the tile's first token in a column.
  __device__ int32_t& base(int column) const { return ints(base_at)[column]; }
  // Of assign: tokens for an expert, of all ranks.
  __device__ int32_t& total(int expert) const { return ints(total_at)[expert]; }
  // Of count: place in the tile of the first bad id.
  __device__ int32_t& first_bad() const { return *ints(bad_at); }
  // Of assign: tokens of the words before, at most 224.
  __device__ uint8_t& prefix(int word, int column) const {
    return reinterpret_cast<uint8_t*>(dynamic_shared() + prefix_at)[word * columns + column];
  }
  __device__ uint8_t& owner(int expert) const {
    return reinterpret_cast<uint8_t*>(dynamic_shared() + owner_at)[expert];
  }
  // Of assign: place in a column of the tile's token t, whose bit is set.
  __device__ int32_t place(int column, int t) const {
    const int word = t / kWarpSize;
    return base(column) + prefix(word, column) +
           __popc(mask(word, column) & lanes_below(t % kWarpSize));
  }

 private:
  __device__ int32_t* ints(size_t at) const {
    return reinterpret_cast<int32_t*>(dynamic_shared() + at);
  }
};

// Before the barrier that mark_tile needs.
__device__ __forceinline__ void prepare_tile(const RouteKernelArgs& args, const TileMemory& tile) {
  for (int i = thread_index(); i < kTileWords * tile.columns; i += kThreads) tile.mask(0, i) = 0;
  for (int e = thread_index(); e < args.dims.num_experts; e += kThreads)
    tile.owner(e) = static_cast<uint8_t>(args.experts.rank[e]);
}

// Sets the masks. id(t, k) gives the expert of a slot of the batch, -1 = none. By the whole block.
template <class Id>
__device__ __forceinline__ void mark_tile(const RouteKernelArgs& args, const TileMemory& tile,
                                          Id id) {
  const int token = thread_index() % kTileTokens, word = token / kWarpSize, topk = args.dims.topk;
  const uint32_t bit = 1u << (token % kWarpSize);
  const int64_t t = int64_t{blockIdx.x} * kTileTokens + token;
  uint64_t ranks = 0;
  for (int first = thread_index() / kTileTokens; first < topk; first += kIdsInFlight * kSlices) {
    int32_t expert[kIdsInFlight];
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      const int k = first + i * kSlices;
      expert[i] = t < args.num_tokens && k < topk ? id(t, k) : -1;
    }
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      if (expert[i] < 0) continue;
      atomicOr(&tile.mask(word, tile.num_ranks + expert[i]), bit);
      ranks |= uint64_t{1} << tile.owner(expert[i]);
    }
  }
  // A warp has the tokens of one word: no contention but between slices.
  for (int r = 0; r < tile.num_ranks; ++r) {
    const uint32_t there = __ballot_sync(kFullWarp, (ranks >> r & 1) != 0);
    if (there != 0 && lane_index() == 0) atomicOr(&tile.mask(word, r), there);
  }
}

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
  const TileMemory tile(args.dims);
  const int topk = args.dims.topk, num_experts = args.dims.num_experts;
  prepare_tile(args, tile);
  if (thread_index() == 0) tile.first_bad() = kNoBadId;
  __syncthreads();
  const int64_t tile_begin = int64_t{blockIdx.x} * kTileTokens;
  mark_tile(args, tile, [&](int64_t t, int k) {
    const int64_t id = load_id(args, t * topk + k);
    const bool good = id >= -1 && id < num_experts;
    if (!good) atomicMin(&tile.first_bad(), static_cast<int32_t>((t - tile_begin) * topk + k));
    const int32_t expert = good ? static_cast<int32_t>(id) : -1;
    args.plan.topk_idx[t * topk + k] = expert;
    return expert;
  });
  __syncthreads();
  for (int column = thread_index(); column < tile.columns; column += kThreads) {
    int32_t count = 0;
#pragma unroll
    for (int word = 0; word < kTileWords; ++word) count += __popc(tile.mask(word, column));
    if (column == 0 && tile.first_bad() != kNoBadId) count |= (tile.first_bad() + 1) << kCountBits;
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
__device__ __forceinline__ void rank_bases(const RouteKernelArgs& args, const TileMemory& tile) {
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
__device__ __forceinline__ void expert_bases(const RouteKernelArgs& args, const TileMemory& tile) {
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
    tile.total(e) = total;
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

// Lines up the aligned groups of one rank's experts, in order of experts; by a warp. The first
// block fills expert_offset from its own rank's.
__device__ __forceinline__ void line_up_groups(const RouteKernelArgs& args, const TileMemory& tile,
                                               int owner) {
  const int num_experts = args.dims.num_experts, lane = lane_index();
  const bool reports = blockIdx.x == 0 && owner == args.rank;
  int32_t end = 0;
  for (int first = 0; first < num_experts; first += kWarpSize) {
    const int e = first + lane;
    const bool mine = e < num_experts && tile.owner(e) == owner;
    const int32_t alignment = args.expert_alignment;
    const int32_t size = mine ? (tile.total(e) + alignment - 1) / alignment * alignment : 0;
    int32_t sum = size;  // of lanes up to this one
#pragma unroll
    for (int d = 1; d < kWarpSize; d *= 2) {
      const int32_t below = __shfl_up_sync(kFullWarp, sum, d);
      if (lane >= d) sum += below;
    }
    if (mine && args.layout == Layout::kExpert) tile.base(tile.num_ranks + e) += end + sum - size;
    if (mine && reports) args.plan.expert_offset[args.experts.local[e]] = end + sum - size;
    end += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }
  if (reports && lane == 0) args.plan.expert_offset[args.dims.local_experts] = end;
}

// The first row of a token at rank r: that of its first slot there.
__device__ __forceinline__ int32_t first_row(const RouteKernelArgs& args, const TileMemory& tile,
                                             const int32_t* ids, int r, int t) {
  for (int k = 0; k < args.dims.topk; ++k)
    if (ids[k] >= 0 && tile.owner(ids[k]) == r) return tile.place(tile.num_ranks + ids[k], t);
  return -1;
}

// slot, row and first_row of the tile's tokens.
__device__ __forceinline__ void write_places(const RouteKernelArgs& args, const TileMemory& tile) {
  const int num_ranks = tile.num_ranks, topk = args.dims.topk;
  const int64_t tile_begin = int64_t{blockIdx.x} * kTileTokens;
  const int tokens = static_cast<int>(min(args.num_tokens - tile_begin, int64_t{kTileTokens}));
  const int32_t* ids = args.plan.topk_idx + tile_begin * topk;
  for (int i = thread_index(); i < tokens * num_ranks; i += kThreads) {
    const int t = i / num_ranks, r = i - t * num_ranks;
    const bool sent = (tile.mask(t / kWarpSize, r) >> (t % kWarpSize) & 1) != 0;
    args.plan.slot[tile_begin * num_ranks + i] = sent ? tile.place(r, t) : -1;
    if (args.layout != Layout::kToken)
      args.plan.first_row[tile_begin * num_ranks + i] =
          sent ? first_row(args, tile, ids + t * topk, r, t) : -1;
  }
  for (int i = thread_index(); i < tokens * topk; i += kThreads) {
    const int32_t e = ids[i];
    int32_t row = -1;
    if (e >= 0)
      row = tile.place(args.layout == Layout::kToken ? tile.owner(e) : num_ranks + e, i / topk);
    args.plan.row[tile_begin * topk + i] = row;
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    assign_kernel(const __grid_constant__ RouteKernelArgs args) {
  const TileMemory tile(args.dims);
  const int topk = args.dims.topk;
  prepare_tile(args, tile);
  rank_bases(args, tile);
  expert_bases(args, tile);
  __syncthreads();
  if (args.layout != Layout::kPadded)
    for (int r = warp_index(); r < tile.num_ranks; r += kThreads / kWarpSize)
      if (args.layout == Layout::kExpert || (blockIdx.x == 0 && r == args.rank))
        line_up_groups(args, tile, r);
  mark_tile(args, tile, [&](int64_t t, int k) { return args.plan.topk_idx[t * topk + k]; });
  __syncthreads();
  for (int column = thread_index(); column < tile.columns; column += kThreads) {
    int before = 0;
#pragma unroll
    for (int word = 0; word < kTileWords; ++word) {
      tile.prefix(word, column) = static_cast<uint8_t>(before);
      before += __popc(tile.mask(word, column));
    }
  }
  __syncthreads();
  write_places(args, tile);
}

LaunchShape tile_shape(const RouteKernelArgs& args) {
  if (args.dims.num_ranks > kMaxPackRanks)
    throw Error("num_ranks is " + std::to_string(args.dims.num_ranks) +
                "; the GPU transports route between at most " + std::to_string(kMaxPackRanks));
  const size_t bytes = TileMemory(args.dims).bytes;
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
