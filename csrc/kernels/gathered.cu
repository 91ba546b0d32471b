// Stage and unstage: a small batch before and behind an all-gather of all ranks' batches.
//
// Does: as kernels/small_dispatch.cuh, in two kernels. stage stores ids, weights and rows at this
// rank's own places; unstage works the routing of all ranks out from the ids, in every block, and
// copies the rows that came for this rank to where they belong.
// Buffers: those of small_dispatch; the window is memory of this rank alone, which somebody else
// fills between the kernels.
// Launch: one block of 512 threads per SM; no block waits for another.
// Memory order: kernels of one stream in order; what was gathered is there before unstage starts.
#include "kernels/device.cuh"
#include "kernels/gathered.h"
#include "kernels/launch.cuh"
#include "kernels/mark.cuh"
#include "kernels/small.cuh"
#include "kernels/small_dispatch.cuh"
#include "kernels/small_staging.cuh"

namespace epcomm {

namespace {

// Reaches nobody: what a rank stores goes to its own window, and all is there when it is read.
struct GatheredLink {
  static constexpr bool kMapped = false;
};
struct GatheredStart {
  __device__ __forceinline__ uint64_t epoch() const { return 0; }
  __device__ __forceinline__ bool lost() const { return false; }
};

}  // namespace

template <>
constexpr bool kPuts<GatheredLink> = false;
template <>
__device__ __forceinline__ bool StagedRows<GatheredLink>::arrived(int, int, const RowPart&) const {
  return true;
}

namespace {

__global__ void __launch_bounds__(kSmallThreads, 1)
    stage_kernel(const __grid_constant__ SmallDispatchArgs args, const Mark mark) {
  EPCOMM_SHARED(int32_t, first_bad);
  make_mark(mark);
  if (blockIdx.x == 0) {
    find_bad_id(args, first_bad);
    report_bad_id(args, first_bad);
  }
  const SmallBlocks blocks(Phase::kSend, kDispatchSenders);
  const BlockRows own(args.num_tokens, blocks.senders);
  const GatheredStart start;
  send_rows<GatheredLink, Quant::kNone, Dtype::kBfloat16>(
      args, own, start, [&] { send_ids<GatheredLink>(args, blocks, start); });
}

__global__ void __launch_bounds__(kSmallThreads, 1)
    unstage_kernel(const __grid_constant__ SmallDispatchArgs args, const Mark mark) {
  EPCOMM_SHARED(LinkCall, call);
  make_mark(mark);
  if (const int s = thread_index(); s < args.link.num_ranks) {
    call.epoch = 0;
    call.clean = true;
    call.entry[s].num_tokens = args.small.max_tokens;
  }
  prepare_route(args, GroupRoute(args));
  __syncthreads();
  const SmallBlocks blocks(Phase::kReceive, kDispatchSenders);
  receive<GatheredLink>(args, ReceivingTeams(blocks.receivers, args.fresh), call, true);
}

}  // namespace

void launch_stage(const SmallDispatchArgs& args, const Mark& mark, int num_sms,
                  cudaStream_t stream) {
  check_aligned(args.x, "x");
  launch("launch of stage", stage_kernel, {persistent_blocks(num_sms), kSmallThreads}, stream, args,
         mark);
}

void launch_unstage(const SmallDispatchArgs& args, const Mark& mark, int num_sms,
                    cudaStream_t stream) {
  check_aligned(args.place.recv_x, "recv_x");
  launch("launch of unstage", unstage_kernel,
         {persistent_blocks(num_sms), kSmallThreads,
          small_shared_bytes(args.place.dims, args.small.max_tokens)},
         stream, args, mark);
}

}  // namespace epcomm
