// How the warps of a kernel that moves rows share its pieces.
#pragma once

#include <climits>
#include <cstdint>

#include "kernels/device.cuh"

namespace epcomm {

/// Hands out the numbers of pieces: to each warp, number w of `warps`, kBeforehand at once (w,
/// w + warps, ...), and every further one to the warp that comes for it first. With equal shares
/// the SMs that get least of the link end last: a dispatch on 16 SMs took 531 us where it takes 462
/// so, and neither 12 nor 24 were as fast.
template <int kBeforehand>
class PieceNumbers {
 public:
  /// taken: LinkState::pieces, which the end of the call clears.
  __device__ __forceinline__ PieceNumbers(uint32_t* taken, int w, int warps, int count)
      : taken_(taken), shared_(warps * kBeforehand), count_(count) {
    if (w + shared_ - warps < count) reserve();
  }
  /// Numbers from `count` on are no pieces, and nothing follows them. By all lanes.
  __device__ __forceinline__ int take() {
    const int number = __shfl_sync(kFullWarp, reserved_, 0);
    if (number < count_) reserve();
    return number;
  }

 private:
  // One ahead of its use, which hides the way to memory.
  __device__ __forceinline__ void reserve() {
    if (lane_index() == 0) reserved_ = shared_ + static_cast<int>(atomicAdd(taken_, 1u));
  }
  uint32_t* taken_;
  int shared_, count_;
  int reserved_ = INT_MAX;
};

}  // namespace epcomm
