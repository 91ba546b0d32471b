// The order in which softnic's card does what it is told (tests/softnic/card_queue.h).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/softnic/card_queue.h"

namespace softnic {
namespace {

constexpr int kPeers = 3;

struct Told {
  int number, peer, fences;
};

// Tells operations, fences and quiets at random, and takes what may be done meanwhile. Gives the
// operations of every take, in order.
std::vector<std::vector<Told>> run(uint64_t chaos, unsigned seed, int count) {
  CardQueue<Told> queue(kPeers, chaos, seed);
  std::mt19937 random(seed);
  std::vector<std::vector<Told>> taken;
  int fences[kPeers] = {}, left[kPeers] = {};
  uint64_t now = 0;
  auto take = [&] {
    now += random() % 50;
    taken.push_back(queue.take(now));
    for (const Told& told : taken.back()) --left[told.peer];
    for (int p = 0; p < kPeers; ++p) EXPECT_EQ(queue.idle(p), left[p] == 0);
  };
  for (int number = 0; number < count;) {
    const int peer = static_cast<int>(random() % kPeers);
    switch (random() % 8) {
      case 0:
        queue.fence(peer);
        ++fences[peer];
        break;
      case 1:
        take();
        break;
      default:
        queue.add(peer, {number++, peer, fences[peer]}, now);
        ++left[peer];
    }
  }
  while (!queue.empty()) take();
  return taken;
}

class SoftnicQueue : public ::testing::TestWithParam<unsigned> {};

TEST_P(SoftnicQueue, DoesEverythingOnceAndNothingBeforeAFence) {
  constexpr int kCount = 500;
  for (const uint64_t chaos : {0u, 1u, 200u}) {
    int fences[kPeers] = {};
    std::vector<int> numbers;
    for (const std::vector<Told>& together : run(chaos, GetParam(), kCount))
      for (int peer = 0; peer < kPeers; ++peer) {
        int of_these = -1;
        for (const Told& told : together) {
          if (told.peer != peer) continue;
          numbers.push_back(told.number);
          // What is done together has no fence between.
          EXPECT_TRUE(of_these < 0 || told.fences == of_these);
          of_these = told.fences;
          EXPECT_GE(told.fences, fences[peer]);
          fences[peer] = told.fences;
        }
      }
    std::sort(numbers.begin(), numbers.end());
    ASSERT_EQ(numbers.size(), size_t{kCount});
    for (int i = 0; i < kCount; ++i) ASSERT_EQ(numbers[static_cast<size_t>(i)], i);
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, SoftnicQueue, ::testing::Range(1u, 9u));

TEST(SoftnicQueueOrder, IsAsToldWithoutChaosAndAnyWithIt) {
  for (const uint64_t chaos : {0u, 200u}) {
    int last[kPeers] = {-1, -1, -1}, overtaken = 0;
    for (const std::vector<Told>& together : run(chaos, 5, 500))
      for (const Told& told : together) {
        overtaken += told.number < last[told.peer] ? 1 : 0;
        last[told.peer] = std::max(last[told.peer], told.number);
      }
    if (chaos == 0)
      EXPECT_EQ(overtaken, 0);
    else
      EXPECT_GT(overtaken, 50);
  }
}

}  // namespace
}  // namespace softnic
