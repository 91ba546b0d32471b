// What a GPU transport needs to move batches by the kernels for small ones: one per call, which
// routes the tokens of all ranks in every block.
#pragma once

#include <string>

namespace epcomm {

/// Why a group of this size cannot; empty = it can.
std::string why_not_small_batches(int num_ranks, int num_experts, int max_tokens);

}  // namespace epcomm
