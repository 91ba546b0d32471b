// Launching kernels from the host.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

#include "epcomm/error.h"
#include "epcomm/types.h"
#include "kernels/cuda_error.h"

namespace epcomm {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  EPCOMM_CUDA_TRY(cudaGetDevice(&device));
  EPCOMM_CUDA_TRY(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

/// Blocks of a kernel of which one fills an SM: num_sms, or all SMs if it is 0.
inline int persistent_blocks(int num_sms) {
  const int present = device_attribute(cudaDevAttrMultiProcessorCount);
  return num_sms > 0 ? std::min(num_sms, present) : present;
}

/// Throws InvalidArgument where 16-byte accesses to p would fault.
inline void check_aligned(const void* p, const char* name) {
  EPCOMM_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0,
               std::string(name) +
                   " is at an address that is not a multiple of 16; expected a tensor that starts "
                   "on one");
}

struct LaunchShape {
  int blocks;
  int threads;
  size_t shared_bytes = 0;  ///< dynamic shared memory per block
};

/// Lets a kernel have so much dynamic shared memory on the current device. The driver is told only
/// of more than it was told before, so that few launches wait for it.
template <class Kernel>
void allow_shared_memory(const char* name, Kernel* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<Kernel*, int>, size_t> allowed;
  int device = 0;
  EPCOMM_CUDA_TRY(cudaGetDevice(&device));
  std::lock_guard lock(mutex);  // until the driver knows: another thread may have told it less
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             name);
  most = bytes;
}

/// Throws Error if the launch fails; what the kernel does later is not waited for.
template <class... Args>
void launch(const char* name, void (*kernel)(Args...), const LaunchShape& shape,
            cudaStream_t stream, const std::type_identity_t<Args>&... args) {
  constexpr size_t kWithoutOptIn = 32 << 10;  // 48 KB with what the kernel declares itself
  if (shape.shared_bytes > kWithoutOptIn) allow_shared_memory(name, kernel, shape.shared_bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), name);
}

/// The kernel for a dtype of rows that are summed, of the three given.
template <class Kernel>
Kernel for_dtype(Dtype dtype, Kernel bfloat16, Kernel float16, Kernel float32) {
  switch (dtype) {
    case Dtype::kBfloat16:
      return bfloat16;
    case Dtype::kFloat16:
      return float16;
    case Dtype::kFloat32:
      return float32;
    default:
      throw Error("rows of dtype " + std::to_string(static_cast<int>(dtype)) +
                  " cannot be summed; expected bf16, fp16 or fp32");
  }
}

}  // namespace epcomm
