#include "core/expert_map.h"

#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "epcomm/error.h"

namespace epcomm {
namespace {

std::vector<int> experts_per_rank(const ExpertMap& map) {
  std::vector<int> counts;
  for (int r = 0; r < map.num_ranks(); ++r) counts.push_back(map.local_experts(r));
  return counts;
}

TEST(ExpertMap, ContiguousSplitHasAShorterTail) {
  EXPECT_EQ(experts_per_rank(ExpertMap(8, 4, {})), (std::vector<int>{2, 2, 2, 2}));
  EXPECT_EQ(experts_per_rank(ExpertMap(10, 4, {})), (std::vector<int>{3, 3, 3, 1}));
  EXPECT_EQ(experts_per_rank(ExpertMap(5, 4, {})), (std::vector<int>{2, 2, 1, 0}));
  EXPECT_EQ(experts_per_rank(ExpertMap(1, 3, {})), (std::vector<int>{1, 0, 0}));
  EXPECT_EQ(ExpertMap(10, 4, {}).max_local_experts(), 3);
}

TEST(ExpertMap, LocalIdsAreDenseAndAscend) {
  for (int ranks : {1, 2, 3, 7})
    for (int experts : {1, 6, 17, 256}) {
      std::vector<int32_t> table;
      for (int e = 0; e < experts; ++e) table.push_back((e * 5 + e / 3) % ranks);
      for (const auto& t : {std::vector<int32_t>{}, table}) {
        const ExpertMap map(experts, ranks, t);
        std::vector<int> next(static_cast<size_t>(ranks), 0);
        for (int e = 0; e < experts; ++e) {
          ASSERT_GE(map.rank(e), 0);
          ASSERT_LT(map.rank(e), ranks);
          if (!t.empty()) {
            EXPECT_EQ(map.rank(e), t[static_cast<size_t>(e)]);
          }
          EXPECT_EQ(map.local(e), next[static_cast<size_t>(map.rank(e))]++);
        }
        EXPECT_EQ(experts_per_rank(map), next);
        EXPECT_EQ(std::accumulate(next.begin(), next.end(), 0), experts);
      }
    }
}

TEST(ExpertMap, RefusesATableThatDoesNotFit) {
  EXPECT_THROW(ExpertMap(4, 2, {0, 1, 0}), InvalidArgument);
  EXPECT_THROW(ExpertMap(4, 2, {0, 1, -1, 0}), InvalidArgument);
  try {
    ExpertMap(4, 2, {0, 1, 0, 2});
    FAIL() << "an owner that is no rank was taken";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("expert_to_rank[3] is 2"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace epcomm
