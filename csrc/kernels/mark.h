// Progress of a stream, seen from the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "epcomm/error.h"

namespace epcomm {

/// A progress word counts marks in its upper 56 bits and names the operation of the last in the
/// lower 8.
constexpr uint64_t progress_count(uint64_t word) { return word >> 8; }
constexpr Operation progress_operation(uint64_t word) {
  return static_cast<Operation>(word & 0xff);
}

/// When the stream gets here, *word (pinned host memory) counts one more mark, as does *count
/// (device memory): the GPU never waits for what it reads from the host. A kernel that runs there
/// anyway makes the mark as it starts (kernels/mark.cuh), else launch_mark. Null word: no mark.
struct Mark {
  uint64_t* word = nullptr;
  uint64_t* count = nullptr;
  Operation operation = Operation::kInit;
};

/// A kernel that does nothing else; none for no mark. Can be captured into a graph.
void launch_mark(const Mark& mark, cudaStream_t stream);

}  // namespace epcomm
