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

/// When the stream gets here, *word (pinned host memory) counts one more mark. Can be captured into
/// a graph.
void launch_mark(uint64_t* word, Operation operation, cudaStream_t stream);

}  // namespace epcomm
