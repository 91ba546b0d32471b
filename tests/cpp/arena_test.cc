#include "core/arena.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <thread>
#include <vector>

namespace epcomm {
namespace {

constexpr size_t kUnit = Arena::kGranularity;

TEST(Arena, JoinsFreeNeighbours) {
  Arena arena(4 * kUnit);
  const auto a = arena.allocate(kUnit), b = arena.allocate(1), c = arena.allocate(kUnit),
             d = arena.allocate(kUnit);
  ASSERT_TRUE(a && b && c && d);
  EXPECT_FALSE(arena.allocate(1));
  EXPECT_EQ(arena.largest_free(), 0u);
  arena.free(*a);
  arena.free(*c);
  EXPECT_EQ(arena.largest_free(), kUnit);
  EXPECT_FALSE(arena.allocate(2 * kUnit)) << "the two free pieces are not adjacent";
  arena.free(*b);  // joins both sides
  EXPECT_EQ(arena.largest_free(), 3 * kUnit);
  arena.free(*d);
  EXPECT_EQ(arena.largest_free(), 4 * kUnit);
  EXPECT_TRUE(arena.allocate(4 * kUnit));
}

TEST(Arena, PiecesOfZeroBytesAreDistinct) {
  Arena arena(8 * kUnit);
  const auto a = arena.allocate(0), b = arena.allocate(0);
  ASSERT_TRUE(a && b);
  EXPECT_NE(*a, *b);
}

TEST(Arena, UsesWholeUnitsOnly) {
  Arena arena(2 * kUnit - 1);
  EXPECT_EQ(arena.largest_free(), kUnit);
  EXPECT_FALSE(arena.allocate(kUnit + 1));
  EXPECT_TRUE(arena.allocate(kUnit));
  EXPECT_FALSE(Arena(kUnit - 1).allocate(0));
}

TEST(Arena, FreeingWhatIsNotAllocatedChangesNothing) {
  Arena arena(4 * kUnit);
  const auto a = arena.allocate(kUnit);
  arena.free(*a);
  arena.free(*a);
  arena.free(3 * kUnit);
  EXPECT_EQ(arena.largest_free(), 4 * kUnit);
}

// The model: which units are taken. First fit is not part of the contract, so the model follows the
// arena's choice and checks that it was legal.
TEST(Arena, RandomUseAgainstAModel) {
  constexpr size_t kUnits = 64;
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    Arena arena(kUnits * kUnit);
    std::vector<bool> taken(kUnits, false);
    std::map<size_t, size_t> pieces;  // first unit -> units
    auto longest_run = [&] {
      size_t longest = 0, run = 0;
      for (bool t : taken) longest = std::max(longest, run = t ? 0 : run + 1);
      return longest;
    };
    for (int step = 0; step < 500; ++step) {
      ASSERT_EQ(arena.largest_free(), longest_run() * kUnit);
      if (random() % 5 < 3 || pieces.empty()) {
        const size_t bytes = random() % (10 * kUnit) + 1, units = (bytes + kUnit - 1) / kUnit;
        const auto offset = arena.allocate(bytes);
        ASSERT_EQ(offset.has_value(), units <= longest_run())
            << "seed " << seed << " step " << step;
        if (!offset) continue;
        ASSERT_EQ(*offset % kUnit, 0u);
        ASSERT_LE(*offset + bytes, kUnits * kUnit);
        for (size_t u = *offset / kUnit; u < *offset / kUnit + units; ++u) {
          ASSERT_FALSE(taken[u]) << "handed out twice";
          taken[u] = true;
        }
        pieces.emplace(*offset / kUnit, units);
      } else {
        auto piece =
            std::next(pieces.begin(), static_cast<std::ptrdiff_t>(random() % pieces.size()));
        arena.free(piece->first * kUnit);
        for (size_t u = 0; u < piece->second; ++u) taken[piece->first + u] = false;
        pieces.erase(piece);
      }
    }
  }
}

TEST(Arena, ThreadsGetDistinctPieces) {
  Arena arena(256 * kUnit);
  std::vector<char> memory(256 * kUnit, 0);
  std::vector<std::thread> threads;
  for (char id = 1; id <= 4; ++id)
    threads.emplace_back([&, id] {
      for (int round = 0; round < 300; ++round) {
        const size_t bytes = kUnit * (1 + static_cast<size_t>(round + id) % 5);
        const auto offset = arena.allocate(bytes);
        ASSERT_TRUE(offset);
        std::fill_n(memory.begin() + static_cast<std::ptrdiff_t>(*offset), bytes, id);
        for (size_t i = 0; i < bytes; i += 64) ASSERT_EQ(memory[*offset + i], id);
        arena.free(*offset);
      }
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(arena.largest_free(), 256 * kUnit);
}

}  // namespace
}  // namespace epcomm
