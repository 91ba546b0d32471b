// The kernels of small batches, and those that enter calls, for GPUs that load and store each
// other's memory.
#include "kernels/exchange.cuh"
#include "kernels/small_combine.cuh"
#include "kernels/small_dispatch.cuh"

namespace epcomm {
namespace {

__global__ void __launch_bounds__(kExchangeThreads, 1)
    enter_kernel(const __grid_constant__ LinkArgs link) {
  EPCOMM_SHARED(LinkCall, call);
  link_enter(link, call);
}

}  // namespace

void launch_enter(const LinkArgs& link, cudaStream_t stream) {
  launch("launch of enter", enter_kernel, {1, kExchangeThreads}, stream, link);
}

const LinkKernels& peer_link_kernels() {
  static constexpr LinkKernels kernels = {&launch_exchange<PeerLink>,
                                          &launch_small_dispatch<PeerLink>,
                                          &launch_small_combine<PeerLink>, false};
  return kernels;
}

}  // namespace epcomm
