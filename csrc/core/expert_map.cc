#include "core/expert_map.h"

#include <algorithm>
#include <string>

#include "epcomm/error.h"

namespace epcomm {

ExpertMap::ExpertMap(int num_experts, int num_ranks, const std::vector<int32_t>& table)
    : rank_(static_cast<size_t>(num_experts)),
      local_(static_cast<size_t>(num_experts)),
      local_experts_(static_cast<size_t>(num_ranks), 0) {
  EPCOMM_CHECK(table.empty() || static_cast<int>(table.size()) == num_experts,
               "expert_to_rank has " + std::to_string(table.size()) +
                   " entries; expected num_experts = " + std::to_string(num_experts));
  const int per_rank = (num_experts + num_ranks - 1) / num_ranks;
  for (int e = 0; e < num_experts; ++e) {
    const size_t i = static_cast<size_t>(e);
    const int owner = table.empty() ? e / per_rank : table[i];
    EPCOMM_CHECK(owner >= 0 && owner < num_ranks,
                 "expert_to_rank[" + std::to_string(e) + "] is " + std::to_string(owner) +
                     "; expected a rank in [0, " + std::to_string(num_ranks) + ")");
    rank_[i] = owner;
    local_[i] = local_experts_[static_cast<size_t>(owner)]++;
  }
}

int ExpertMap::max_local_experts() const {
  return *std::max_element(local_experts_.begin(), local_experts_.end());
}

}  // namespace epcomm
