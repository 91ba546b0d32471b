// The routing and row kernels on a simulated GPU: the cases of tests/cpp/kernels_gpu_test.cu that
// take little time there.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tests/cpp/kernels_cases.h"
#include "tests/sim/runtime.h"

namespace epcomm::test {
namespace {

constexpr int kMostTokens = 257;             // two tiles
constexpr int kMostSlots = 16384;            // of all ranks
constexpr int64_t kMostPadding = 256 << 20;  // bytes of a rank's alignment

TEST(KernelsSim, EverySmallCase) {
  int ran = 0;
  for (const Case& c : make_cases(kMostTokens)) {
    if (c.num_ranks * c.tokens * c.topk > kMostSlots && c.num_ranks < 40) continue;
    if (c.num_ranks >= 40 && c.chunks == 1) continue;
    if (int64_t{c.num_experts} / c.num_ranks * c.alignment * c.row_bytes > kMostPadding) continue;
    ++ran;
    ++sim::options().seed;
    SCOPED_TRACE(describe(c) + ", simulator's seed " + std::to_string(sim::options().seed));
    Device device;
    const int failed = num_failed, passed = num_passed;
    ASSERT_NO_THROW(run_case(device, c)) << testing::PrintToString(sim::take_faults());
    ASSERT_EQ(num_failed, failed);
    ASSERT_GT(num_passed, passed);
  }
  EXPECT_GT(ran, 50);
}

}  // namespace
}  // namespace epcomm::test
