// Dispatch between nodes, in one kernel. A row is put once to each remote node that wants it, and
// written once to each rank that wants it, straight into its place in the tensor that the rank's
// caller gets: by its source within the node, by the forwarder elsewhere.
//
// Buffers: x, scales [T, bytes], topk_weights [T, K] and the plan's send block are read. In this
// rank's window: out areas are filled and put to in areas of forwarders (kernels/rail_layout.h). In
// the node windows, at the offsets that rank r announced: rows, scales and records of recv_x,
// recv_scales and recv_meta, entries of recv_topk_idx and recv_topk_weights. What stays of
// forwarded rows (ForwardedLayout) and their node_count in the plan are written.
// Launch: num_sms blocks, one per SM, all of which must find room at some time: blocks wait for
// other blocks, of this rank, too. The first warps of a block move rows: those of this rank within
// the node, then those that arrive. The other warps put: a chunk each, to the nodes in shifted
// order; then they write records and scales, in the same order as the others move rows. Nobody
// waits for what comes before all of its own is on its way.
// Memory order: kernels/link.cuh, kernels/rail.cuh, kernels/move_rows.cuh.
#include <algorithm>

#include "kernels/launch.cuh"
#include "kernels/move_rows.cuh"
#include "kernels/rail.cuh"
#include "kernels/rows.cuh"
#include "kernels/statistics.cuh"

namespace epcomm {
namespace {

constexpr int kWarps = 16;  // with more there are not enough registers, with what NVSHMEM needs
constexpr int kThreads = kWarps * kWarpSize;
static_assert(RowMover::kMaxWarps < kWarps);
constexpr size_t kSharedBytes = 200 << 10;  // for stages
constexpr int kPutUnroll = 8;               // vectors that a lane has in flight to an out area

struct KernelArgs {
  RailDispatchArgs dispatch;
  MoverShape shape;
};
static_assert(sizeof(KernelArgs) <= kMaxKernelArgs);

// This rank and its node.
struct Here {
  int rank, node, first, size, num_nodes;

  __device__ __forceinline__ explicit Here(const RailArgs& args)
      : rank(args.link.rank),
        node(args.map.node(rank)),
        first(args.map.first(node)),
        size(args.map.size(node)),
        num_nodes(args.map.num_nodes()) {}
  // The rank of the node that lane i serves; itself last.
  __device__ __forceinline__ int peer(int i) const { return first + (rank - first + 1 + i) % size; }
};

// ---- along the rail ----

// A row with its scales and its record, in the place that it is put from. By a warp.
__device__ __forceinline__ void write_rail_row(const RailDispatchArgs& args, const RailRow& layout,
                                               int to_first, int64_t t, char* to) {
  const int topk = args.dims.topk, num_ranks = args.dims.num_ranks, lane = lane_index();
  const int vectors = args.rows.row_bytes / kVectorBytes;
  const char* from = args.x + t * args.rows.row_bytes;
  BatchOf<kPutUnroll> batch;
  for (int at = 0; at < vectors; at += BatchOf<kPutUnroll>::kStep) {
    batch.load(from, at + lane, vectors);
    batch.store(to, at + lane, vectors);
  }
  if (args.rows.scale_bytes != 0)
    copy_bytes(to + layout.scales_at, args.scales + t * args.rows.scale_bytes,
               args.rows.scale_bytes);
  TokenSlots slots;
  slots.token = static_cast<int32_t>(t);
  if (lane < topk) {
    slots.row = args.plan.row[t * topk + lane];
    slots.expert = args.plan.topk_idx[t * topk + lane];
    if (args.topk_weights != nullptr) slots.weight = args.topk_weights[t * topk + lane];
  }
  write_record(layout.meta, layout.record(to), slots, true);
  if (lane < layout.node_size) {
    const int64_t at = t * num_ranks + to_first + lane;
    layout.slot(to)[lane] = args.plan.slot[at];
    layout.first_row(to)[lane] = args.first_row[at];
  }
}

// Warp w of `warps` puts chunks to all remote nodes; the nodes take turns.
__device__ __forceinline__ void put_chunks(const RailDispatchArgs& args, const Here& here,
                                           uint64_t epoch, int w, int warps) {
  const RailArgs& rail = args.rail;
  const NodeMap& map = rail.map;
  char* window = rail.link.window[here.rank];
  const int others = here.num_nodes - 1;
  if (w == 0 && lane_index() < others) {
    const int node = map.node_at(here.rank, lane_index()), peer = map.rail_peer(here.rank, node);
    NvshmemLink::signal(rail.link, peer, rail.rail.count(map.source_index(peer, here.rank)),
                        rail_count(epoch, args.plan.node_count[here.rank * here.num_nodes + node]));
  }
  const int chunks = rail.rail.chunks.count(args.num_tokens);
  for (int j = w; j < chunks * others; j += warps) {
    const int node = map.node_at(here.rank, j % others), peer = map.rail_peer(here.rank, node);
    const RailChunk chunk(rail.rail.chunks, map.source_index(peer, here.rank), j / others,
                          args.plan.node_count[here.rank * here.num_nodes + node]);
    if (chunk.empty()) continue;
    const RailRow layout(args.dims.topk, map.size(node), args.rows.row_bytes,
                         args.rows.scale_bytes);
    const size_t at = static_cast<size_t>(chunk.begin) * layout.bytes;
    const size_t from = rail.rail.out_area(node) + at, to = rail.rail.in_area(chunk.area) + at;
    const int32_t* tokens = args.plan.node_token + int64_t{node} * args.num_tokens;
    for (int m = chunk.begin; m < chunk.end; ++m)
      write_rail_row(args, layout, map.first(node), tokens[m],
                     window + from + static_cast<size_t>(m - chunk.begin) * layout.bytes);
    const auto bytes =
        static_cast<uint32_t>(chunk.end - chunk.begin) * static_cast<uint32_t>(layout.bytes);
    rail_put(rail, epoch, peer, {from, to, bytes}, rail.rail.signal(chunk.area, chunk.number));
  }
}

// What comes from the sources that this rank forwards for, by a warp: lane i knows how many rows
// come from source i.
struct Arrivals {
  const RailDispatchArgs& args;
  const RailSources& sources;
  uint64_t epoch;
  int32_t total = 0;

  // Waits until all have said it. False in all lanes if the wait was given up.
  __device__ __forceinline__ bool wait_for_counts() {
    const RailArgs& rail = args.rail;
    bool there = true;
    if (const int i = lane_index(); i < sources.count) {
      const uint64_t* word = rail_word(rail, rail.rail.count(i));
      there =
          wait_signal<NvshmemLink>(rail.link, sources.rank[i], word, rail_count(epoch, 0), false);
      if (there) total = min(rail_rows(load_relaxed_system(word)), rail.rail.max_tokens);
    }
    __syncwarp();
    if (__all_sync(kFullWarp, there) != 0) return true;
    rail_lost(rail);
    return false;
  }
  // Calls visit(layout, chunk, address of its first row) for chunks w, w + warps, ... when each has
  // arrived. Ends early if the link is lost.
  template <class Visit>
  __device__ __forceinline__ void for_each_chunk(const Here& here, int w, int warps,
                                                 Visit visit) const {
    const RailArgs& rail = args.rail;
    const RailRow layout(args.dims.topk, here.size, args.rows.row_bytes, args.rows.scale_bytes);
    for (int j = w; j < rail.rail.max_chunks * sources.count; j += warps) {
      const int i = j % sources.count, number = j / sources.count;
      if (__any_sync(kFullWarp, rail.rail.chunks.begin(number) < total) == 0) return;
      const RailChunk chunk(rail.rail.chunks, i, number, __shfl_sync(kFullWarp, total, i));
      if (chunk.empty()) continue;
      if (!rail_arrived(rail, epoch, sources.rank[i], i, number)) return;
      visit(layout, chunk,
            rail.link.window[here.rank] + rail.rail.in_area(i) +
                static_cast<size_t>(chunk.begin) * layout.bytes);
    }
  }
};

// ---- rows within the node ----

__device__ __forceinline__ char* row_at(const RailDispatchArgs& args, const LinkCall& call,
                                        int peer, int32_t row) {
  if (row < 0) return nullptr;
  return args.rail.node_window[peer] + call.entry[peer].rows + int64_t{row} * args.rows.row_bytes;
}

__device__ __forceinline__ void move_rows(const RailDispatchArgs& args, const LinkCall& call,
                                          const Here& here, const RailSources& sources,
                                          RowMover& mover, int w, int warps) {
  const int num_ranks = args.dims.num_ranks, lane = lane_index();
  const int peer = here.peer(lane);
  const bool serves = lane < here.size;
  int32_t next = -1;  // of the token after this: loaded while this one moves
  auto own_row = [&](int t) {
    next = serves && t < args.num_tokens ? args.first_row[int64_t{t} * num_ranks + peer] : -1;
  };
  own_row(w);
  for (int t = w; t < args.num_tokens; t += warps) {
    char* to = row_at(args, call, peer, next);
    own_row(t + warps);
    if (__any_sync(kFullWarp, to != nullptr))
      mover.move(args.x + int64_t{t} * args.rows.row_bytes, to);
  }
  Arrivals arrivals{args, sources, call.epoch};
  if (!arrivals.wait_for_counts()) return;
  arrivals.for_each_chunk(here, w, warps,
                          [&](const RailRow& layout, const RailChunk& chunk, char* rows) {
                            auto arrived_row = [&](char* row) {
                              next = serves ? layout.first_row(row)[peer - here.first] : -1;
                            };
                            arrived_row(rows);
                            for (int m = chunk.begin; m < chunk.end; ++m) {
                              char *row = rows, *to = row_at(args, call, peer, next);
                              rows += layout.bytes;
                              if (m + 1 < chunk.end) arrived_row(rows);
                              mover.move(row, to);
                            }
                          });
}

// ---- what goes beside the rows ----

// The record, the slots and the scales of a token at each rank of the node that gets it. Lane i has
// `slot` and `row` at the rank that it serves; lane k < K has slot k of the token in `slots`.
__device__ __forceinline__ void deliver_beside(const RailDispatchArgs& args, const LinkCall& call,
                                               const Here& here, TokenSlots slots, int32_t slot,
                                               int32_t row, const char* scales) {
  const MetaLayout meta(args.dims.topk);
  const int owner = slots.expert >= 0 ? args.experts.rank[slots.expert] : -1;
  const int32_t owners_row = slots.row;
  const int32_t local = slots.expert >= 0 ? args.experts.local[slots.expert] : -1;
  for (uint32_t rest = __ballot_sync(kFullWarp, slot >= 0); rest != 0;) {
    const int i = take_lowest(rest), peer = here.peer(i);
    const int64_t n = __shfl_sync(kFullWarp, slot, i), to = __shfl_sync(kFullWarp, row, i);
    const LinkEntry& there = call.entry[peer];
    char* window = args.rail.node_window[peer];
    if (args.records) {
      slots.row = owner == peer ? owners_row : -1;
      write_record(meta, meta.row(window + there.meta, n), slots, args.topk_weights != nullptr);
    }
    write_slots(window, there, args.dims.topk, n, owner == peer ? local : -1, slots.weight);
    if (args.rows.scale_bytes != 0)
      copy_bytes(window + there.scales + to * args.rows.scale_bytes, scales, args.rows.scale_bytes);
  }
}

__device__ __forceinline__ void send_beside(const RailDispatchArgs& args, const LinkCall& call,
                                            const Here& here, int w, int warps) {
  const int topk = args.dims.topk, num_ranks = args.dims.num_ranks, lane = lane_index();
  for (int t = w; t < args.num_tokens; t += warps) {
    TokenSlots slots;
    slots.token = t;
    if (lane < topk) {
      slots.row = args.plan.row[int64_t{t} * topk + lane];
      slots.expert = args.plan.topk_idx[int64_t{t} * topk + lane];
      if (args.topk_weights != nullptr) slots.weight = args.topk_weights[int64_t{t} * topk + lane];
    }
    int32_t slot = -1, row = -1;
    if (lane < here.size) {
      slot = args.plan.slot[int64_t{t} * num_ranks + here.peer(lane)];
      row = args.first_row[int64_t{t} * num_ranks + here.peer(lane)];
    }
    deliver_beside(args, call, here, slots, slot, row,
                   args.scales + int64_t{t} * args.rows.scale_bytes);
  }
}

__device__ __forceinline__ void forward_beside(const RailDispatchArgs& args, const LinkCall& call,
                                               const Here& here, const RailSources& sources, int w,
                                               int warps) {
  const int topk = args.dims.topk, lane = lane_index();
  const ForwardedLayout kept{topk, here.size, args.rail.rail.max_tokens};
  Arrivals arrivals{args, sources, call.epoch};
  if (!arrivals.wait_for_counts()) return;
  if (w == 0 && args.records && lane < sources.count)  // combines ask for it
    args.plan.node_count[sources.rank[lane] * here.num_nodes + here.node] = arrivals.total;
  arrivals.for_each_chunk(
      here, w, warps, [&](const RailRow& layout, const RailChunk& chunk, char* rows) {
        for (int m = chunk.begin; m < chunk.end; ++m, rows += layout.bytes) {
          char* record = layout.record(rows);
          TokenSlots slots;
          slots.token = *layout.meta.token(record, 0);
          if (lane < topk) {
            slots.row = layout.meta.row(record, 0)[lane];
            slots.expert = layout.meta.topk_idx(record, 0)[lane];
            slots.weight = layout.meta.topk_weights(record, 0)[lane];
          }
          int32_t slot = -1, row = -1;
          if (lane < here.size) {
            const int j = here.peer(lane) - here.first;
            slot = layout.slot(rows)[j];
            row = layout.first_row(rows)[j];
            if (args.records) kept.slot(args.plan.forwarded, chunk.area, m)[j] = slot;
          }
          if (args.records) {
            if (lane < topk) kept.topk_idx(args.plan.forwarded, chunk.area, m)[lane] = slots.expert;
            if (lane == 0) *kept.token(args.plan.forwarded, chunk.area, m) = slots.token;
          }
          deliver_beside(args, call, here, slots, slot, row, rows + layout.scales_at);
        }
      });
}

__global__ void __launch_bounds__(kThreads, 1)
    rail_dispatch_kernel(const __grid_constant__ KernelArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  EPCOMM_SHARED(RailSources, sources);
  EPCOMM_SHARED(BulkBarrier[RowMover::kMaxWarps * RowMover::kStages], loaded);
  EPCOMM_SHARED(RowMover::Targets[RowMover::kMaxWarps], targets);
  const RailDispatchArgs& dispatch = args.dispatch;
  const RailArgs& rail = dispatch.rail;
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  if (has_no_routing(rail.link, dispatch.room)) return;
  if (link_enter<NvshmemLink>(rail.link, call, nullptr, 0, missing_room(dispatch.room))) {
    const Here here(rail);
    sources.fill(rail);
    if (block == 0 && rail.link.statistics.received_tokens != nullptr)
      for (int e = thread_index(); e < dispatch.dims.local_experts;
           e += static_cast<int>(blockDim.x))
        add_received(rail.link.statistics, e, dispatch.plan.tokens_per_expert[e]);
    const int warp = warp_index(), movers = args.shape.warps;
    if (warp < movers) {
      // Warps of one block have tokens far apart, so that few tokens, too, spread over all SMs.
      RowMover mover(args.shape, loaded + warp * RowMover::kStages,
                     dynamic_shared() + warp * RowMover::kStages * args.shape.piece_bytes,
                     targets[warp]);
      move_rows(dispatch, call, here, sources, mover, warp * blocks + block, movers * blocks);
      mover.finish();
    } else {
      const int w = (warp - movers) * blocks + block, warps = (kWarps - movers) * blocks;
      put_chunks(dispatch, here, call.epoch, w, warps);
      send_beside(dispatch, call, here, w, warps);
      forward_beside(dispatch, call, here, sources, w, warps);
    }
  }
  link_finish<NvshmemLink>(rail.link, call);
}

MoverShape shape_of(int row_bytes, bool bulk) {
  MoverShape shape;
  shape.row_bytes = row_bytes;
  shape.pieces = (row_bytes + RowMover::kMaxPieceBytes - 1) / RowMover::kMaxPieceBytes;
  shape.piece_bytes = static_cast<int32_t>(align_up(
      static_cast<size_t>((row_bytes + shape.pieces - 1) / shape.pieces), size_t{kBulkLine}));
  shape.pieces = (row_bytes + shape.piece_bytes - 1) / shape.piece_bytes;
  shape.warps = RowMover::kMaxWarps;
  if (bulk)
    shape.warps = std::min<int32_t>(
        shape.warps, static_cast<int32_t>(kSharedBytes / (RowMover::kStages *
                                                          static_cast<size_t>(shape.piece_bytes))));
  return shape;
}

}  // namespace

void launch_rail_dispatch(const RailDispatchArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.x, "x");
  const bool bulk = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const MoverShape shape = shape_of(args.rows.row_bytes, bulk);
  const size_t stages = bulk ? static_cast<size_t>(shape.warps * RowMover::kStages) *
                                   static_cast<size_t>(shape.piece_bytes)
                             : 0;
  launch("launch of rail_dispatch", rail_dispatch_kernel,
         {persistent_blocks(num_sms), kThreads, stages}, stream, KernelArgs{args, shape});
}

}  // namespace epcomm
