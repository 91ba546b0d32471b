// Which tokens of a batch go to which node.
//
// Buffers: plan.topk_idx [T, K] is read; node_slot [T, M], node_token [M, T] and this rank's row of
// node_count [R, M] are written.
// Launch: one block per node; it takes the tokens in order, kThreads at a time.
// Memory order: kernels of one stream in order.
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/rail.h"

namespace epcomm {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarpSize;

struct NodeSlotArgs {
  NodeMap map;
  int32_t rank, num_tokens, topk;
  DeviceExperts experts;
  PlanView plan;
};

__device__ __forceinline__ bool goes_to(const NodeSlotArgs& args, int64_t t, int node) {
  for (int k = 0; k < args.topk; ++k) {
    const int32_t expert = args.plan.topk_idx[t * args.topk + k];
    if (expert >= 0 && args.map.node(args.experts.rank[expert]) == node) return true;
  }
  return false;
}

__global__ void __launch_bounds__(kThreads, 1)
    node_slots_kernel(const __grid_constant__ NodeSlotArgs args) {
  EPCOMM_SHARED(int32_t[kWarps], in_warp);
  const int node = static_cast<int>(blockIdx.x), nodes = static_cast<int>(gridDim.x);
  int32_t* tokens = args.plan.node_token + int64_t{node} * args.num_tokens;
  int32_t before = 0;  // tokens of earlier rounds that go to the node
  for (int first = 0; first < args.num_tokens; first += kThreads) {
    const int t = first + thread_index();
    const bool goes = t < args.num_tokens && goes_to(args, t, node);
    const uint32_t lanes = __ballot_sync(kFullWarp, goes);
    if (lane_index() == 0) in_warp[warp_index()] = __popc(lanes);
    __syncthreads();
    int32_t slot = before + __popc(lanes & lanes_below(lane_index()));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_index()) slot += in_warp[w];
      before += in_warp[w];
    }
    if (t < args.num_tokens) args.plan.node_slot[int64_t{t} * nodes + node] = goes ? slot : -1;
    if (goes) tokens[slot] = t;
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
