#include "transport/host_channel.h"

#include <gtest/gtest.h>

#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using testing::run_threads;

constexpr double kTimeout = 60, kShort = 0.5;
constexpr Dims kDims{3, 3, 1, 1};

// Rank 2 stops in the middle of its signals: rank 0 has its rows and goes on to the next call,
// where it misses rank 1, too, which still waits for rank 2 in the first.
TEST(HostChannel, ARankThatOnlyWaitsIsNotBlamed) {
  run_threads(3, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    auto window = make_host_window(*bootstrap, ControlLayout(kDims).arena, kTimeout);
    HostChannel channel(*bootstrap, *window, kDims, rank == 0 ? kShort : kTimeout);
    channel.begin(Operation::kDispatch);
    channel.enter_all({}, nullptr);
    channel.signal_done(0);
    if (rank != 2) {
      channel.signal_done(1);
      channel.signal_done(2);
      try {
        channel.wait_all_done();
        EXPECT_EQ(rank, 0);
        channel.begin(Operation::kCombine);
        channel.enter_all({}, nullptr);
        ADD_FAILURE() << "rank " << rank << " returned without rank 2";
      } catch (const PeerLost& lost) {
        EXPECT_EQ(lost.rank, 2);
        EXPECT_EQ(lost.operation, Operation::kCombine);
        EXPECT_EQ(lost.epoch, 2u);
      }
    }
    bootstrap->barrier();
  });
}

}  // namespace
}  // namespace epcomm
