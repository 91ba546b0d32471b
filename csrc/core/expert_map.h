// Which rank owns which expert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace epcomm {

/// Global expert id -> owner rank and local expert id. Local ids follow ascending global ids.
class ExpertMap {
 public:
  /// table: owner of each expert; empty = contiguous split, ceil(num_experts / num_ranks) experts a
  /// rank, the last ranks getting the shorter rest. Throws InvalidArgument for an owner out of
  /// range.
  ExpertMap(int num_experts, int num_ranks, const std::vector<int32_t>& table);

  int num_experts() const { return static_cast<int>(rank_.size()); }
  int num_ranks() const { return static_cast<int>(local_experts_.size()); }
  int rank(int expert) const { return rank_[static_cast<size_t>(expert)]; }
  int local(int expert) const { return local_[static_cast<size_t>(expert)]; }
  int local_experts(int rank) const { return local_experts_[static_cast<size_t>(rank)]; }
  int max_local_experts() const;
  const std::vector<int32_t>& ranks() const { return rank_; }    ///< [num_experts]
  const std::vector<int32_t>& locals() const { return local_; }  ///< [num_experts]

 private:
  std::vector<int32_t> rank_, local_, local_experts_;
};

}  // namespace epcomm
