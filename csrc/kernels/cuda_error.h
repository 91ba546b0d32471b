// CUDA runtime errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "epcomm/error.h"

namespace epcomm {

/// Throws Error naming the call and CUDA's reason. Clears the error that the runtime remembers, so
/// that the next, unrelated call does not report it again.
inline void check_cuda(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();
  throw Error(std::string(call) + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) +
              ")");
}

}  // namespace epcomm

#define EPCOMM_CUDA_TRY(call) ::epcomm::check_cuda((call), #call)
