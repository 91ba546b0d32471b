// How much a rank can receive in one call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "epcomm/types.h"
#include "kernels/token_layout.h"

namespace epcomm {

/// Most rows of a layout in which a rank with so many experts receives `tokens` tokens of topk
/// experts each.
inline int64_t most_recv_rows(Layout layout, int64_t tokens, int topk, int64_t local_experts,
                              int64_t expert_alignment) {
  if (layout == Layout::kToken) return tokens;
  if (layout == Layout::kPadded) return tokens * local_experts;
  const int64_t rows =
      tokens * std::min<int64_t>(topk, local_experts) + (expert_alignment - 1) * local_experts;
  return static_cast<int64_t>(
      align_up(static_cast<size_t>(rows), static_cast<size_t>(expert_alignment)));
}

}  // namespace epcomm
