/// What deep_ep's get_dispatch_layout says of a routing. Local: nothing is exchanged.
#pragma once

#include <cstdint>

#include "epcomm/types.h"

namespace epcomm {

/// A routing, and what is said of it; all in device memory. T tokens, K slots, E experts, R ranks.
/// Rank r owns the experts [r * E / R, (r + 1) * E / R). A token that names an expert twice counts
/// once; an id outside [0, E) names none.
struct DispatchLayoutArgs {
  const void* topk_idx;  ///< [T, K]
  IndexType index_type;  ///< of topk_idx
  int32_t num_tokens;
  int32_t topk;
  int32_t num_experts;         ///< a multiple of num_ranks
  int32_t num_ranks;           ///< a multiple of num_nodes
  int32_t num_nodes;           ///< rank r is on node r / (num_ranks / num_nodes)
  int32_t* tokens_per_rank;    ///< [R], as all that follow written whole
  int32_t* tokens_per_node;    ///< [num_nodes], or null
  int32_t* tokens_per_expert;  ///< [E]
  uint8_t* is_token_in_rank;   ///< [T, R]: 0 or 1
  void* stream;                ///< cudaStream_t
};

/// One kernel on args.stream. Throws InvalidArgument where a rank has more experts than fit the
/// shared memory of a block.
void dispatch_layout_cuda(const DispatchLayoutArgs& args);

}  // namespace epcomm
