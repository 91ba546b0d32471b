// Does: counts how often a stream has passed a point, in pinned memory that the host reads.
// Launch: one thread. Memory order: one 8-byte store; the host only compares counts, reads nothing
// else.
#include "kernels/launch.cuh"
#include "kernels/mark.h"

namespace epcomm {
namespace {

__global__ void mark_kernel(volatile uint64_t* word, uint64_t operation) {
  *word = (((*word >> 8) + 1) << 8) | operation;
}

}  // namespace

void launch_mark(uint64_t* word, Operation operation, cudaStream_t stream) {
  launch("launch of mark", mark_kernel, {1, 1}, stream, word, static_cast<uint64_t>(operation));
}

}  // namespace epcomm
