// Does: counts how often a stream has passed a point, where no other kernel can do it on the way.
// Launch: one thread. Memory order: kernels/mark.cuh.
#include "kernels/launch.cuh"
#include "kernels/mark.cuh"

namespace epcomm {
namespace {

__global__ void mark_kernel(const Mark mark) { make_mark(mark); }

}  // namespace

void launch_mark(const Mark& mark, cudaStream_t stream) {
  if (mark.word == nullptr) return;
  launch("launch of mark", mark_kernel, {1, 1}, stream, mark);
}

}  // namespace epcomm
