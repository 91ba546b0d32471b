// Which tokens of a batch go to which node.
//
// Buffers: plan.topk_idx [T, K] is read; node_slot [T, M], node_token [M, T] and this rank's row of
// node_count [R, M] are written.
// Launch: one block per node; it takes the tokens in order, kRounds * kThreads at a time.
// Memory order: kernels of one stream in order.
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/rail.h"

namespace epcomm {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarpSize;
constexpr int kRounds = 4;  // tokens of a thread at a time: it waits for their ids together
static_assert(kWarps == kWarpSize, "a lane per warp");

struct NodeSlotArgs {
  NodeMap map;
  int32_t rank, num_tokens, topk;
  DeviceExperts experts;
  PlanView plan;
};

// No early exit: the ids are loaded side by side.
__device__ __forceinline__ bool goes_to(const NodeSlotArgs& args, int64_t t, int node) {
  bool goes = false;
#pragma unroll 4
  for (int k = 0; k < args.topk; ++k) {
    const int32_t expert = args.plan.topk_idx[t * args.topk + k];
    if (expert >= 0) goes |= args.map.node(args.experts.rank[expert]) == node;
  }
  return goes;
}

__global__ void __launch_bounds__(kThreads, 1)
    node_slots_kernel(const __grid_constant__ NodeSlotArgs args) {
  EPCOMM_SHARED(int32_t[kRounds][kWarps], in_warp);
  const int node = static_cast<int>(blockIdx.x), nodes = static_cast<int>(gridDim.x);
  int32_t* tokens = args.plan.node_token + int64_t{node} * args.num_tokens;
  int32_t before = 0;  // tokens of earlier rounds that go to the node
  for (int first = 0; first < args.num_tokens; first += kRounds * kThreads) {
    bool goes[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int t = first + i * kThreads + thread_index();
      goes[i] = t < args.num_tokens && goes_to(args, t, node);
    }
    uint32_t lanes[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      lanes[i] = __ballot_sync(kFullWarp, goes[i]);
      if (lane_index() == 0) in_warp[i][warp_index()] = __popc(lanes[i]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int32_t there = in_warp[i][lane_index()];  // of the warp that has the lane's number
      const int32_t slot = before +
                           __reduce_add_sync(kFullWarp, lane_index() < warp_index() ? there : 0) +
                           __popc(lanes[i] & lanes_below(lane_index()));
      before += __reduce_add_sync(kFullWarp, there);
      const int t = first + i * kThreads + thread_index();
      if (t < args.num_tokens) args.plan.node_slot[int64_t{t} * nodes + node] = goes[i] ? slot : -1;
      if (goes[i]) tokens[slot] = t;
    }
    __syncthreads();
  }
  if (thread_index() == 0) args.plan.node_count[args.rank * nodes + node] = before;
}

}  // namespace

void launch_node_slots(const NodeMap& map, int rank, int num_tokens, int topk,
                       const DeviceExperts& experts, const PlanView& plan, cudaStream_t stream) {
  launch("launch of node_slots", node_slots_kernel, {map.num_nodes(), kThreads}, stream,
         NodeSlotArgs{map, rank, num_tokens, topk, experts, plan});
}

}  // namespace epcomm
