#include "epcomm/bootstrap.h"

#include <gtest/gtest.h>

#include <vector>

#include "core/subgroup.h"
#include "epcomm/error.h"
#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using testing::now_s;
using testing::run_threads;

TEST(InProcessBootstrap, GathersInRankOrder) {
  for (int size : {1, 2, 5})
    run_threads(size, 30, [size](std::shared_ptr<Bootstrap> b) {
      EXPECT_TRUE(b->in_process());
      EXPECT_EQ(b->size(), size);
      for (int round = 0; round < 50; ++round) {
        const int mine[2] = {b->rank() + 100 * round, -b->rank()};
        std::vector<int> all(static_cast<size_t>(2 * size), -1);
        b->all_gather(mine, all.data(), sizeof mine);
        for (int r = 0; r < size; ++r) {
          EXPECT_EQ(all[static_cast<size_t>(2 * r)], r + 100 * round);
          EXPECT_EQ(all[static_cast<size_t>(2 * r + 1)], -r);
        }
      }
    });
}

TEST(InProcessBootstrap, BarrierWaitsForAll) {
  std::atomic<int> entered{0};
  run_threads(4, 30, [&](std::shared_ptr<Bootstrap> b) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10 * b->rank()));
    ++entered;
    b->barrier();
    EXPECT_EQ(entered.load(), 4);
  });
}

TEST(InProcessBootstrap, GivesUpOnARankThatDoesNotCome) {
  constexpr double kTimeout = 0.2;
  auto all = make_in_process_bootstraps(2, kTimeout);
  const double start = now_s();
  try {
    all[0]->barrier();
    FAIL() << "the barrier opened for one of two ranks";
  } catch (const PeerLost& lost) {
    EXPECT_EQ(lost.rank, -1);
    EXPECT_EQ(lost.operation, Operation::kInit);
  }
  EXPECT_GE(now_s() - start, kTimeout);
  EXPECT_LT(now_s() - start, kTimeout + 1);
}

// Subgroups of different sizes that make different numbers of exchanges, of different sizes.
TEST(SubgroupBootstrap, GathersAmongItsRanks) {
  const int first_of[] = {0, 0, 0, 3, 3, 5}, size_of[] = {3, 3, 3, 2, 2, 1};
  run_threads(6, 30, [&](std::shared_ptr<Bootstrap> b) {
    const int first = first_of[b->rank()], size = size_of[b->rank()];
    for (int again = 0; again < 3; ++again) {
      SubgroupBootstrap group(*b, first, size);
      EXPECT_EQ(group.rank(), b->rank() - first);
      EXPECT_EQ(group.size(), size);
      for (int round = 0; round < 4 * size; ++round) {
        std::vector<int> mine(static_cast<size_t>(first + round), b->rank() + 10 * round);
        std::vector<int> all(mine.size() * static_cast<size_t>(size), -1);
        group.all_gather(mine.data(), all.data(), mine.size() * sizeof(int));
        for (size_t i = 0; i < all.size(); ++i)
          ASSERT_EQ(all[i], first + static_cast<int>(i / mine.size()) + 10 * round);
      }
      group.finish();
    }
    b->barrier();  // the whole group is in step
  });
}

}  // namespace
}  // namespace epcomm
