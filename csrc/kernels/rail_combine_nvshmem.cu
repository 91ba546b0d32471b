// Combine between nodes, behind the kernel that stores partial rows into the windows of the node.
//
// enter: begins the call; with weights, sends those of this rank's tokens to all ranks, in pieces,
// and waits for theirs.
// combine: adds up, for the sources that this rank forwards for, what the ranks of the node have
// for each of their tokens, and puts the sums back, in chunks; then adds up this rank's own tokens,
// node by node, each when its sums have come.
//
// Buffers (kernels/rail_layout.h): weights of all ranks lie in this rank's window; partial rows of
// the ranks of the node in its node window; sums go from its out areas to the in areas of the
// sources. forward_slot, plan.slot [T, R], node_slot [T, M], rank_count, node_count and bias are
// read; out is written.
// Launch: num_sms blocks, one per SM, all at the same time (a cooperative launch). A warp takes
// whole chunks, then whole tokens. Nobody waits for another node before all that it returns is on
// its way.
// Memory order: kernels/link.cuh, kernels/rail.cuh. Partial rows are stored by the kernels before,
// which a fence at system scope and the signal of block 0 release.
#include "kernels/elements.cuh"
#include "kernels/launch.cuh"
#include "kernels/partials.cuh"
#include "kernels/rail.cuh"
#include "kernels/rows.cuh"

namespace epcomm {
namespace {

constexpr int kEnterThreads = 512, kEnterBlocks = 8;
constexpr int kThreads = 512;  // with more there are not enough registers, with what NVSHMEM needs
static_assert(sizeof(RailCombineArgs) <= kMaxKernelArgs && sizeof(RailEnterArgs) <= kMaxKernelArgs);

__device__ __forceinline__ int weight_pieces(const RailEnterArgs& args, int tokens) {
  const size_t bytes = static_cast<size_t>(tokens) * static_cast<size_t>(args.topk) * sizeof(float);
  return static_cast<int>((bytes + RailLayout::kWeightPiece - 1) / RailLayout::kWeightPiece);
}

__device__ __forceinline__ void put_weights(const RailEnterArgs& args, uint64_t epoch) {
  const RailArgs& rail = args.rail;
  const LinkArgs& link = rail.link;
  constexpr int kFloats = static_cast<int>(RailLayout::kWeightPiece / sizeof(float));
  const int warps = kEnterThreads / kWarpSize * static_cast<int>(gridDim.x);
  const int w = warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  const int floats = args.num_tokens * args.topk;
  const size_t place = rail.rail.source_weights(link.rank);
  auto* own = reinterpret_cast<float*>(link.window[link.rank] + place);
  for (int p = w; p < weight_pieces(args, args.num_tokens); p += warps) {
    const int begin = p * kFloats, end = min(begin + kFloats, floats);
    for (int i = begin + lane_index(); i < end; i += kWarpSize) own[i] = args.topk_weights[i];
    const LinkPiece piece = same_place(place + static_cast<size_t>(begin) * sizeof(float),
                                       static_cast<size_t>(end - begin) * sizeof(float));
    for (int i = 1; i < link.num_ranks; ++i)
      rail_put(rail, epoch, (link.rank + i) % link.num_ranks, piece,
               rail.rail.weight_signal(link.rank, p));
  }
}

// By the whole block.
__device__ __forceinline__ void wait_for_weights(const RailEnterArgs& args, const LinkCall& call) {
  const RailArgs& rail = args.rail;
  const int most = rail.rail.weight_pieces;
  for (int i = thread_index(); i < rail.link.num_ranks * most; i += kEnterThreads) {
    const int source = i / most, piece = i % most;
    if (source == rail.link.rank || piece >= weight_pieces(args, call.entry[source].num_tokens))
      continue;
    const uint64_t* word = rail_word(rail, rail.rail.weight_signal(source, piece));
    if (!wait_signal<NvshmemLink>(rail.link, source, word, call.epoch, piece == 0))
      return rail_lost(rail);
  }
}

__global__ void __launch_bounds__(kEnterThreads, 1)
    rail_enter_kernel(const __grid_constant__ RailEnterArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  if (!link_enter<NvshmemLink>(args.rail.link, call) || args.topk_weights == nullptr) return;
  put_weights(args, call.epoch);
  if (blockIdx.x == 0) wait_for_weights(args, call);
}

// Tokens that lower ranks have sent to each rank of this node: slots there less this are indices
// among the tokens of one source. In shared memory.
struct SentBefore {
  int32_t source[kMaxLinkRanks][kMaxLinkRanks];  // of source i that this rank forwards for
  int32_t own[kMaxLinkRanks];                    // of this rank

  // By the whole block; ends with a barrier.
  __device__ __forceinline__ void fill(const RailCombineArgs& args, const RailSources& sources,
                                       int first, int size) {
    const int num_ranks = args.dims.num_ranks;
    for (int j = thread_index(); j < (sources.count + 1) * size; j += kThreads) {
      const int i = j / size, r = j % size;
      const int s = i < sources.count ? sources.rank[i] : args.rail.link.rank;
      int32_t sum = 0;
      for (int lower = 0; lower < s; ++lower)
        sum += args.plan.rank_count[lower * num_ranks + first + r];
      (i < sources.count ? source[i] : own)[r] = sum;
    }
    __syncthreads();
  }
};

// Says that the kernels before have stored this rank's partial rows, and waits for those of the
// node. By the whole block; ends with a barrier. False: the wait was given up.
__device__ __forceinline__ bool exchange_partials(const RailCombineArgs& args, uint64_t epoch,
                                                  int first, int size) {
  const RailArgs& rail = args.rail;
  const int r = thread_index(), rank = rail.link.rank;
  bool lost = false;
  if (r < size) {
    if (blockIdx.x == 0) {
      fence_system();
      store_release_system(reinterpret_cast<uint64_t*>(rail.node_window[first + r] +
                                                       NodeWindowLayout::signal(rank - first)),
                           epoch);
    }
    lost = !wait_signal(
        rail.link, first + r,
        reinterpret_cast<const uint64_t*>(rail.node_window[rank] + NodeWindowLayout::signal(r)),
        epoch);
  }
  if (__syncthreads_or(lost) == 0) return true;
  if (r == 0) rail_lost(rail);
  return false;
}

// The partial rows of one token in this rank's node window: lane r < size has the index of that of
// rank r of the node, -1 = none, in one area.
struct NodeRows {
  const RailCombineArgs& args;
  int area;
  int64_t row_bytes;

  __device__ __forceinline__ const char* at(int contributor, int32_t index) const {
    return args.rail.node_window[args.rail.link.rank] +
           args.node.partial_rows(contributor, area, static_cast<size_t>(row_bytes)) +
           index * row_bytes;
  }
  // The rounded sum of the vectors v, v + 32, ..., ranks ascending.
  template <Dtype kDtype>
  __device__ __forceinline__ void sum(int32_t index, int v, int end, Batch& batch) const {
    Sum<kDtype> sum;
    sum.clear();
    for (uint32_t rest = __ballot_sync(kFullWarp, index >= 0); rest != 0;) {
      const int r = take_lowest(rest);
      batch.load<RowMemory::kArrived>(at(r, __shfl_sync(kFullWarp, index, r)), v, end);
      sum.add(batch);
    }
    sum.round_to(batch);
  }
};

// Sums for the tokens of other nodes, by warp w of `warps`.
template <Dtype kDtype>
__device__ __forceinline__ void return_sums(const RailCombineArgs& args, uint64_t epoch,
                                            const RailSources& sources, const SentBefore& before,
                                            int w, int warps) {
  const RailArgs& rail = args.rail;
  const NodeMap& map = rail.map;
  const int rank = rail.link.rank, node = map.node(rank), size = map.size(node);
  const int lane = lane_index(), num_nodes = map.num_nodes();
  const int row_bytes = args.hidden * kElementBytes<kDtype>, vectors = row_bytes / kVectorBytes;
  for (int j = w; j < rail.rail.max_chunks * sources.count; j += warps) {
    // The rails of a node begin with different sources.
    const int i = (j + map.local_rank(rank)) % sources.count, source = sources.rank[i];
    const RailChunk chunk(rail.rail.chunks, i, j / sources.count,
                          args.plan.node_count[source * num_nodes + node]);
    if (chunk.empty()) continue;
    const size_t at = static_cast<size_t>(chunk.begin) * static_cast<size_t>(row_bytes);
    const size_t from = rail.rail.out_area(i) + at;
    const NodeRows rows{args, 1 + i, row_bytes};
    for (int m = chunk.begin; m < chunk.end; ++m) {
      int32_t index = -1;
      if (lane < size) {
        index = args.forward_slot[(int64_t{i} * rail.rail.max_tokens + m) * size + lane];
        if (index >= 0) index -= before.source[i][lane];
      }
      char* to = rail.link.window[rank] + from + int64_t{m - chunk.begin} * row_bytes;
      for (int v = 0; v < vectors; v += Batch::kStep) {
        Batch batch{};
        rows.sum<kDtype>(index, v + lane, vectors, batch);
        batch.store(to, v + lane, vectors);
      }
    }
    const auto bytes =
        static_cast<uint32_t>(chunk.end - chunk.begin) * static_cast<uint32_t>(row_bytes);
    rail_put(rail, epoch, source, {from, rail.rail.in_area(node) + at, bytes},
             rail.rail.signal(node, chunk.number));
  }
}

// This rank's tokens, by warp w of `warps`.
template <Dtype kDtype>
__device__ __forceinline__ void sum_tokens(const RailCombineArgs& args, uint64_t epoch,
                                           const SentBefore& before, int w, int warps) {
  const RailArgs& rail = args.rail;
  const NodeMap& map = rail.map;
  const int rank = rail.link.rank, own = map.node(rank), first = map.first(own);
  const int lane = lane_index(), num_nodes = map.num_nodes();
  const int64_t row_bytes = int64_t{args.hidden} * kElementBytes<kDtype>;
  const int vectors = static_cast<int>(row_bytes) / kVectorBytes;
  const NodeRows rows{args, 0, row_bytes};
  for (int64_t t = w; t < args.num_tokens; t += warps) {
    int32_t index = -1, node_slot = -1;
    if (lane < map.size(own)) {
      index = args.plan.slot[t * args.dims.num_ranks + first + lane];
      if (index >= 0) index -= before.own[lane];
    }
    bool there = true;
    if (lane < num_nodes) node_slot = args.plan.node_slot[t * num_nodes + lane];
    if (node_slot >= 0 && lane != own)
      there = wait_signal<NvshmemLink>(
          rail.link, map.rail_peer(rank, lane),
          rail_word(rail, rail.rail.signal(lane, node_slot / rail.rail.chunks.rows)), epoch);
    __syncwarp();
    if (__all_sync(kFullWarp, there) == 0) return rail_lost(rail);
    const uint32_t nodes = __ballot_sync(kFullWarp, node_slot >= 0);
    for (int at = 0; at < vectors; at += Batch::kStep) {
      const int v = at + lane;
      Sum<kDtype> sum;
      sum.clear();
      Batch batch{};
      for (uint32_t rest = nodes; rest != 0;) {
        const int b = take_lowest(rest);
        const int64_t m = __shfl_sync(kFullWarp, node_slot, b);
        if (b == own)
          rows.sum<kDtype>(index, v, vectors, batch);
        else
          batch.load<RowMemory::kArrived>(
              rail.link.window[rank] + rail.rail.in_area(b) + m * row_bytes, v, vectors);
        sum.add(batch);
      }
      if (args.bias != nullptr) {
        batch.load(static_cast<const char*>(args.bias) + t * row_bytes, v, vectors);
        sum.add(batch);
      }
      sum.round_to(batch);
      batch.store(static_cast<char*>(args.out) + t * row_bytes, v, vectors);
    }
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads, 1)
    rail_combine_kernel(const __grid_constant__ RailCombineArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  EPCOMM_SHARED(RailSources, sources);
  EPCOMM_SHARED(SentBefore, before);
  const RailArgs& rail = args.rail;
  const int node = rail.map.node(rail.link.rank);
  const int first = rail.map.first(node), size = rail.map.size(node);
  // The call was entered by an earlier kernel, which has told the host what it found.
  if (link_begin(rail.link, call) && link_agree<NvshmemLink>(rail.link, call, false) &&
      exchange_partials(args, call.epoch, first, size)) {
    sources.fill(rail);
    before.fill(args, sources, first, size);
    const int w = warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    const int warps = kThreads / kWarpSize * static_cast<int>(gridDim.x);
    return_sums<kDtype>(args, call.epoch, sources, before, w, warps);
    sum_tokens<kDtype>(args, call.epoch, before, w, warps);
  }
  link_finish<NvshmemLink>(rail.link, call);
}

}  // namespace

void launch_rail_enter(const RailEnterArgs& args, cudaStream_t stream) {
  launch(
      "launch of rail_enter", rail_enter_kernel,
      {args.topk_weights == nullptr ? 1 : persistent_blocks(kEnterBlocks), kEnterThreads, 0, true},
      stream, args);
}

void launch_rail_combine(const RailCombineArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.bias, "bias");
  check_aligned(args.out, "out");
  const auto kernel =
      for_dtype(args.dtype, rail_combine_kernel<Dtype::kBfloat16>,
                rail_combine_kernel<Dtype::kFloat16>, rail_combine_kernel<Dtype::kFloat32>);
  launch("launch of rail_combine", kernel, {persistent_blocks(num_sms), kThreads, 0, true}, stream,
         args);
}

}  // namespace epcomm
