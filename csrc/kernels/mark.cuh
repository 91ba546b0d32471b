// The mark that a kernel makes as it starts.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/device.cuh"
#include "kernels/mark.h"

namespace epcomm {

/// By all threads; one of them makes the mark. Kernels of one stream come one after another, so
/// nobody else counts meanwhile. One 8-byte store to the host, which only compares counts, reads
/// nothing else.
__device__ __forceinline__ void make_mark(const Mark& mark) {
  if (mark.word == nullptr || blockIdx.x != 0 || thread_index() != 0) return;
  const uint64_t count = *mark.count + 1;
  *mark.count = count;
  *static_cast<volatile uint64_t*>(mark.word) = count << 8 | static_cast<uint64_t>(mark.operation);
}

}  // namespace epcomm
