// What small batches need of a block, on any link.
#include "kernels/route_tile.cuh"
#include "kernels/small.cuh"
#include "kernels/small.h"

namespace epcomm {

size_t small_shared_bytes(const Dims& dims, int max_tokens) {
  return static_cast<size_t>(dims.num_ranks) * RouteTile(dims, mask_words(max_tokens)).bytes +
         RouteExperts(dims).bytes();
}

}  // namespace epcomm
