#include "epcomm/bootstrap.h"

#include <gtest/gtest.h>

#include <vector>

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

}  // namespace
}  // namespace epcomm
