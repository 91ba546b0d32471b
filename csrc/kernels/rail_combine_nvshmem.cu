// Combine between nodes.
//
// enter: begins the call; with weights, sends those of this rank's tokens to all ranks, in pieces,
// and waits for theirs.
// combine: adds up, for the sources that this rank forwards for, what the ranks of the node have
// for each of their tokens, and puts the sums back, in chunks; then adds up this rank's own tokens,
// node by node, each when its sums have come.
//
// Buffers (kernels/rail_layout.h): weights of all ranks lie in this rank's window. Rows of the
// ranks of the node are loaded from their x, at the offset that they announced, row slot for a
// token; or, of a rank that has pushed, its partial rows from this rank's node window. Sums go from
// its out areas to the in areas of the sources. What stayed of forwarded rows, plan.slot [T, R],
// topk_idx [T, K], node_slot [T, M], rank_count, node_count and bias are read; out is written.
// Launch: num_sms blocks, one per SM, all of which must find room at some time: blocks wait for
// other blocks, of this rank, too. A warp takes whole chunks, then whole tokens. Nobody waits for
// another node before all that it returns is on its way.
// Memory order: kernels/link.cuh, kernels/rail.cuh. x is acquired with the entries of its ranks.
// Partial rows are stored by the kernels before, which a fence at system scope and the signal of
// block 0 release.
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

// Where a block finds the rows of the ranks of its node, in shared memory.
struct NodeSources {
  const char* rows[kMaxLinkRanks];  // x of rank r of the node; of one that has pushed, its partials
  uint32_t pushed;                  // bit r: partial rows, weights already applied
  // Tokens that lower ranks have sent to rank r: slots there less this are indices among the tokens
  // of one source. [0]: of this rank; [1 + i]: of source i that it forwards for.
  int32_t sent_before[kMaxLinkRanks][kMaxLinkRanks];

  // By the whole block; ends with a barrier.
  __device__ __forceinline__ void fill(const RailCombineArgs& args, const LinkCall& call,
                                       const RailSources& sources, int first, int size) {
    const RailArgs& rail = args.rail;
    const int lane = lane_index(), num_ranks = args.dims.num_ranks;
    if (warp_index() == 0) {
      const bool stored = lane < size && call.entry[first + lane].pushed != 0;
      if (lane < size)
        rows[lane] = stored ? rail.node_window[rail.link.rank]
                            : rail.node_window[first + lane] + call.entry[first + lane].rows;
      const uint32_t set = __ballot_sync(kFullWarp, stored);
      if (lane == 0) pushed = set;
    }
    for (int j = thread_index(); j < (sources.count + 1) * size; j += kThreads) {
      const int i = j / size, r = j % size;
      const int s = i == 0 ? rail.link.rank : sources.rank[i - 1];
      int32_t sum = 0;
      for (int lower = 0; lower < s; ++lower)
        sum += args.plan.rank_count[lower * num_ranks + first + r];
      sent_before[i][r] = sum;
    }
    __syncthreads();
  }
};

// Says that the kernels before have stored this rank's partial rows, if they have, and waits for
// those ranks of the node that push. By the whole block; ends with a barrier. False: the wait was
// given up.
__device__ __forceinline__ bool exchange_partials(const RailCombineArgs& args, const LinkCall& call,
                                                  int first, int size) {
  const RailArgs& rail = args.rail;
  const int r = thread_index(), rank = rail.link.rank;
  bool lost = false;
  if (r < size) {
    if (blockIdx.x == 0 && rail.link.entry.pushed != 0) {
      fence_system();
      store_release_system(reinterpret_cast<uint64_t*>(rail.node_window[first + r] +
                                                       NodeWindowLayout::signal(rank - first)),
                           call.epoch);
    }
    if (call.entry[first + r].pushed != 0)
      lost = !wait_signal(
          rail.link, first + r,
          reinterpret_cast<const uint64_t*>(rail.node_window[rank] + NodeWindowLayout::signal(r)),
          call.epoch);
  }
  if (__syncthreads_or(lost) == 0) return true;
  if (r == 0) rail_lost(rail);
  return false;
}

// One token in the ranks of the node. Lane r < size has its slot at rank r of the node, -1 = none;
// with weights, lane k < K has the owner and the weight of slot k of the token.
struct NodeToken {
  int32_t slot = -1, owner = -1;
  float weight = 0.0f;

  // ids, weights: of the token, [K].
  __device__ __forceinline__ void weigh_by(const RailCombineArgs& args, const int32_t* ids,
                                           const float* weights) {
    const int lane = lane_index();
    if (lane >= args.dims.topk) return;
    const int32_t expert = ids[lane];
    owner = expert >= 0 ? args.experts.rank[expert] : -1;
    weight = weights[lane];
  }
};

__device__ __forceinline__ const float* weights_of(const RailCombineArgs& args, int source,
                                                   int64_t token) {
  const RailArgs& rail = args.rail;
  return reinterpret_cast<const float*>(rail.link.window[rail.link.rank] +
                                        rail.rail.source_weights(source)) +
         token * args.dims.topk;
}

// The sum that the node has for the vectors v, v + 32, ... of a token of a source (0: this rank's
// own; 1 + i), ranks ascending, rounded.
template <Dtype kDtype>
__device__ __forceinline__ void sum_node(const RailCombineArgs& args, const NodeSources& node,
                                         int source, const NodeToken& token, int v, int end,
                                         Batch& batch) {
  const int64_t row_bytes = int64_t{args.hidden} * kElementBytes<kDtype>;
  const int first = args.rail.map.first(args.rail.map.node(args.rail.link.rank));
  Sum<kDtype> sum;
  sum.clear();
  for (uint32_t rest = __ballot_sync(kFullWarp, token.slot >= 0); rest != 0;) {
    const int r = take_lowest(rest);
    const int64_t slot = __shfl_sync(kFullWarp, token.slot, r);
    if ((node.pushed >> r & 1) != 0) {
      const char* partials =
          node.rows[r] + args.node.partial_rows(r, source, static_cast<size_t>(row_bytes));
      batch.load<RowMemory::kArrived>(partials + (slot - node.sent_before[source][r]) * row_bytes,
                                      v, end);
    } else {
      batch.load<RowMemory::kArrived>(node.rows[r] + slot * row_bytes, v, end);
      if (args.weighted) {
        Sum<kDtype> partial;
        partial.clear();
        for (uint32_t slots = __ballot_sync(kFullWarp, token.owner == first + r); slots != 0;)
          partial.add_weighted(batch, __shfl_sync(kFullWarp, token.weight, take_lowest(slots)));
        partial.round_to(batch);
      }
    }
    sum.add(batch);
  }
  sum.round_to(batch);
}

// Sums for the tokens of other nodes, by warp w of `warps`.
template <Dtype kDtype>
__device__ __forceinline__ void return_sums(const RailCombineArgs& args, uint64_t epoch,
                                            const RailSources& sources, const NodeSources& here,
                                            int w, int warps) {
  const RailArgs& rail = args.rail;
  const NodeMap& map = rail.map;
  const int rank = rail.link.rank, node = map.node(rank), size = map.size(node);
  const int lane = lane_index(), num_nodes = map.num_nodes();
  const int row_bytes = args.hidden * kElementBytes<kDtype>, vectors = row_bytes / kVectorBytes;
  const ForwardedLayout kept{args.dims.topk, size, rail.rail.max_tokens};
  for (int j = w; j < rail.rail.max_chunks * sources.count; j += warps) {
    // The rails of a node begin with different sources.
    const int i = (j + map.local_rank(rank)) % sources.count, source = sources.rank[i];
    const RailChunk chunk(rail.rail.chunks, i, j / sources.count,
                          args.plan.node_count[source * num_nodes + node]);
    if (chunk.empty()) continue;
    const size_t at = static_cast<size_t>(chunk.begin) * static_cast<size_t>(row_bytes);
    const size_t from = rail.rail.out_area(i) + at;
    for (int m = chunk.begin; m < chunk.end; ++m) {
      NodeToken token;
      if (lane < size) token.slot = kept.slot(args.plan.forwarded, i, m)[lane];
      if (args.weighted)
        token.weigh_by(args, kept.topk_idx(args.plan.forwarded, i, m),
                       weights_of(args, source, *kept.token(args.plan.forwarded, i, m)));
      char* to = rail.link.window[rank] + from + int64_t{m - chunk.begin} * row_bytes;
      for (int v = lane; v - lane < vectors; v += Batch::kStep) {
        Batch batch{};
        sum_node<kDtype>(args, here, 1 + i, token, v, vectors, batch);
        batch.store(to, v, vectors);
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
                                           const NodeSources& here, int w, int warps) {
  const RailArgs& rail = args.rail;
  const NodeMap& map = rail.map;
  const int rank = rail.link.rank, own = map.node(rank), first = map.first(own);
  const int lane = lane_index(), num_nodes = map.num_nodes(), topk = args.dims.topk;
  const int64_t row_bytes = int64_t{args.hidden} * kElementBytes<kDtype>;
  const int vectors = static_cast<int>(row_bytes) / kVectorBytes;
  for (int64_t t = w; t < args.num_tokens; t += warps) {
    NodeToken token;
    if (lane < map.size(own)) token.slot = args.plan.slot[t * args.dims.num_ranks + first + lane];
    if (args.weighted)
      token.weigh_by(args, args.plan.topk_idx + t * topk, weights_of(args, rank, t));
    int32_t node_slot = -1;
    if (lane < num_nodes) node_slot = args.plan.node_slot[t * num_nodes + lane];
    bool there = true;
    if (node_slot >= 0 && lane != own)
      there = wait_signal<NvshmemLink>(
          rail.link, map.rail_peer(rank, lane),
          rail_word(rail, rail.rail.signal(lane, node_slot / rail.rail.chunks.rows)), epoch);
    __syncwarp();
    if (__all_sync(kFullWarp, there) == 0) return rail_lost(rail);
    const uint32_t nodes = __ballot_sync(kFullWarp, node_slot >= 0);
    for (int v = lane; v - lane < vectors; v += Batch::kStep) {
      Batch own_sum{}, batch{};
      if ((nodes >> own & 1) != 0) sum_node<kDtype>(args, here, 0, token, v, vectors, own_sum);
      Sum<kDtype> sum;
      sum.clear();
      for (uint32_t rest = nodes; rest != 0;) {
        const int b = take_lowest(rest);
        const int64_t m = __shfl_sync(kFullWarp, node_slot, b);
        if (b == own) {
          sum.add(own_sum);
          continue;
        }
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
  EPCOMM_SHARED(NodeSources, here);
  const RailArgs& rail = args.rail;
  const int node = rail.map.node(rail.link.rank);
  const int first = rail.map.first(node), size = rail.map.size(node);
  // The call was entered by an earlier kernel, which has told the host what it found.
  if (link_begin(rail.link, call) && link_agree<NvshmemLink>(rail.link, call, false) &&
      exchange_partials(args, call, first, size)) {
    sources.fill(rail);
    here.fill(args, call, sources, first, size);
    const int w = warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    const int warps = kThreads / kWarpSize * static_cast<int>(gridDim.x);
    return_sums<kDtype>(args, call.epoch, sources, here, w, warps);
    sum_tokens<kDtype>(args, call.epoch, here, w, warps);
  }
  link_finish<NvshmemLink>(rail.link, call);
}

}  // namespace

void launch_rail_enter(const RailEnterArgs& args, cudaStream_t stream) {
  launch("launch of rail_enter", rail_enter_kernel,
         {args.topk_weights == nullptr ? 1 : persistent_blocks(kEnterBlocks), kEnterThreads},
         stream, args);
}

void launch_rail_combine(const RailCombineArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.bias, "bias");
  check_aligned(args.out, "out");
  const auto kernel =
      for_dtype(args.dtype, rail_combine_kernel<Dtype::kBfloat16>,
                rail_combine_kernel<Dtype::kFloat16>, rail_combine_kernel<Dtype::kFloat32>);
  launch("launch of rail_combine", kernel, {persistent_blocks(num_sms), kThreads}, stream, args);
}

}  // namespace epcomm
