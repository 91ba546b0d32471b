// What kernels add to a caller's counters (Statistics), where it has given any. Nobody waits for
// the additions, and they need no order: whoever reads the counters does so after the call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "epcomm/types.h"

namespace epcomm {

/// A dispatch has delivered tokens to local_expert. By one thread of the grid for each expert.
__device__ __forceinline__ void add_received(const Statistics& statistics, int local_expert,
                                             int32_t tokens) {
  using Word = unsigned long long;
  atomicAdd(reinterpret_cast<Word*>(statistics.received_tokens + local_expert),
            static_cast<Word>(tokens));
}

/// A wait for a rank has taken so long. Any number of threads may say so.
__device__ __forceinline__ void note_wait(const Statistics& statistics, int rank, uint64_t ns) {
  using Word = unsigned long long;
  atomicMax(reinterpret_cast<Word*>(statistics.max_wait_ns + rank), static_cast<Word>(ns));
}

}  // namespace epcomm
