// The kernels of small batches for GPUs that reach each other through NVSHMEM.
#include "kernels/exchange.cuh"
#include "kernels/link_nvshmem.cuh"
#include "kernels/small_combine.cuh"
#include "kernels/small_dispatch.cuh"

namespace epcomm {

const LinkKernels& nvshmem_link_kernels() {
  static constexpr LinkKernels kernels = {&launch_exchange<NvshmemLink>,
                                          &launch_small_dispatch<NvshmemLink>,
                                          &launch_small_combine<NvshmemLink>, true};
  return kernels;
}

}  // namespace epcomm
