// Messages that more than one layer raises.
#pragma once

#include <cstdint>
#include <string>

namespace epcomm {

/// Of an expert id outside [-1, num_experts). position: token * topk + slot.
inline std::string bad_expert_id(int rank, int64_t position, int topk, int64_t id,
                                 int num_experts) {
  const std::string token = std::to_string(position / topk), slot = std::to_string(position % topk);
  return "topk_idx[" + token + ", " + slot + "] on rank " + std::to_string(rank) + " (token " +
         token + ", slot " + slot + ") is " + std::to_string(id) + "; expected an expert in [0, " +
         std::to_string(num_experts) + ") or -1 for none";
}

}  // namespace epcomm
