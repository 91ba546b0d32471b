// Pieces of symmetric memory for groups of a job; ranks are threads, and memory is the host's.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "epcomm/error.h"
#include "tests/cpp/ranks.h"
#include "transport/gpu_symmetric_heap.h"

namespace epcomm {
namespace {

constexpr size_t kUnit = 64 << 10;
constexpr double kTimeout = 20;

// A job of which each process has a heap; addresses are made up, alike on all.
struct Job {
  explicit Job(int pes, size_t room = size_t{1} << 40) : taken(static_cast<size_t>(pes)) {
    for (int pe = 0; pe < pes; ++pe)
      heaps.push_back(std::make_unique<SymmetricHeap>(pes, [this, pe, room](size_t bytes) -> char* {
        std::vector<size_t>& mine = taken[static_cast<size_t>(pe)];
        mine.push_back(bytes);
        if (std::accumulate(mine.begin(), mine.end(), size_t{0}) > room) return nullptr;
        return reinterpret_cast<char*>(mine.size() << 40);
      }));
  }
  std::vector<std::unique_ptr<SymmetricHeap>> heaps;
  std::vector<std::vector<size_t>> taken;  // by PE
};

using Pieces = std::vector<std::unique_ptr<SymmetricHeap::Piece>>;

// One piece for each of these PEs, which are the ranks of a group in this order.
Pieces allocate(Job& job, const std::vector<int>& pes, size_t bytes, size_t slab = 0) {
  Pieces pieces(pes.size());
  testing::run_threads(
      static_cast<int>(pes.size()), kTimeout, [&](std::shared_ptr<Bootstrap> group) {
        const auto r = static_cast<size_t>(group->rank());
        pieces[r] = job.heaps[static_cast<size_t>(pes[r])]->allocate(*group, pes, bytes, slab);
      });
  for (const auto& piece : pieces) EXPECT_EQ(piece->data(), pieces[0]->data());
  return pieces;
}

TEST(SymmetricHeap, TakesSlabsAndCutsThem) {
  Job job(3);
  Pieces a = allocate(job, {0, 1, 2}, 1, 10 * kUnit);
  EXPECT_EQ(job.taken[0], std::vector<size_t>{10 * kUnit});
  Pieces b = allocate(job, {0, 1, 2}, 3 * kUnit + 1);  // four units
  EXPECT_EQ(b[0]->data() - a[0]->data(), static_cast<ptrdiff_t>(kUnit));
  Pieces c = allocate(job, {0, 1, 2}, 5 * kUnit);
  EXPECT_EQ(c[0]->data() - b[0]->data(), static_cast<ptrdiff_t>(4 * kUnit));
  EXPECT_EQ(job.taken[0].size(), 1u);
  Pieces d = allocate(job, {0, 1, 2}, kUnit, 1);  // full: another slab, as large as needed
  EXPECT_EQ(job.taken[0], (std::vector<size_t>{10 * kUnit, kUnit}));
  char* freed = b[0]->data();
  b.clear();
  Pieces e = allocate(job, {2, 0, 1}, 2 * kUnit);  // ranks in another order
  EXPECT_EQ(e[0]->data(), freed);
}

TEST(SymmetricHeap, GroupsShareASlab) {
  Job job(4);
  Pieces all = allocate(job, {0, 1, 2, 3}, kUnit, 4 * kUnit);
  Pieces left = allocate(job, {0, 1}, kUnit), right = allocate(job, {3, 2}, kUnit);
  EXPECT_EQ(left[0]->data(), right[0]->data());  // the same place, of other processes
  // What is free on some but not on all: the first place that suits everyone.
  left.clear();
  Pieces mixed = allocate(job, {1, 2}, kUnit);
  EXPECT_EQ(mixed[0]->data() - all[0]->data(), static_cast<ptrdiff_t>(2 * kUnit));
}

// A process that was in the last group, but is not in this one, may still write there.
TEST(SymmetricHeap, MemoryGoesOnlyToGroupsOfAllItsUsers) {
  Job job(3);
  Pieces all = allocate(job, {0, 1, 2}, kUnit, 3 * kUnit);
  char* first = all[0]->data();
  all.clear();
  Pieces pair = allocate(job, {0, 1}, kUnit);
  EXPECT_EQ(pair[0]->data() - first, static_cast<ptrdiff_t>(kUnit));
  char* second = pair[0]->data();
  pair.clear();
  Pieces other = allocate(job, {0, 2}, kUnit);
  EXPECT_EQ(other[0]->data() - first, static_cast<ptrdiff_t>(2 * kUnit));
  EXPECT_EQ(allocate(job, {1, 0}, kUnit)[0]->data(), second);
  EXPECT_EQ(allocate(job, {0, 1, 2}, 2 * kUnit)[0]->data(), first);  // over both
}

TEST(SymmetricHeap, AbandonedMemoryStaysAway) {
  Job job(2);
  Pieces lost = allocate(job, {0, 1}, kUnit, 2 * kUnit);
  char* data = lost[0]->data();
  lost[1]->abandon();  // one of them is enough
  lost.clear();
  EXPECT_NE(allocate(job, {0, 1}, kUnit)[0]->data(), data);
}

template <class Call>
void expect_error(Call call, const std::vector<std::string>& parts) {
  try {
    call();
    ADD_FAILURE() << "no error";
  } catch (const Error& e) {
    for (const std::string& part : parts)
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(SymmetricHeap, SaysWhyThereIsNoRoom) {
  Job job(3, 4 * kUnit);
  expect_error([&] { allocate(job, {0, 1}, kUnit); }, {"2 of the 3 ranks", "window_bytes"});
  Pieces all = allocate(job, {0, 1, 2}, kUnit, 4 * kUnit);
  expect_error([&] { allocate(job, {0, 1, 2}, 4 * kUnit); },
               {"taking 262144 bytes", "no room", "NVSHMEM_SYMMETRIC_SIZE"});
  allocate(job, {0, 1}, 3 * kUnit);  // goes on
}

// Any order of groups and ends: pieces that live at the same time on one process never overlap.
TEST(SymmetricHeap, PiecesNeverOverlap) {
  constexpr int kPes = 4;
  std::mt19937 random(1);
  Job job(kPes);
  struct Live {
    std::vector<int> pes;
    size_t bytes;
    Pieces pieces;
  };
  std::vector<Live> live;
  Live keep{{0, 1, 2, 3}, kUnit, allocate(job, {0, 1, 2, 3}, kUnit, 400 * kUnit)};
  live.push_back(std::move(keep));
  for (int step = 0; step < 60; ++step) {
    if (live.size() > 6) live.erase(live.begin() + static_cast<long>(random() % live.size()));
    std::vector<int> pes;
    for (int pe = 0; pe < kPes; ++pe)
      if (random() % 2 == 0) pes.push_back(pe);
    if (pes.size() < 2) pes = {0, 1, 2, 3};
    std::shuffle(pes.begin(), pes.end(), random);
    const size_t bytes = (1 + random() % 6) * kUnit;
    live.push_back({pes, bytes, allocate(job, pes, bytes)});
    const Live& last = live.back();
    for (size_t i = 0; i + 1 < live.size(); ++i) {
      const bool meet = std::any_of(pes.begin(), pes.end(), [&](int pe) {
        return std::count(live[i].pes.begin(), live[i].pes.end(), pe) != 0;
      });
      if (!meet) continue;
      const char *a = live[i].pieces[0]->data(), *b = last.pieces[0]->data();
      EXPECT_TRUE(a + live[i].bytes <= b || b + last.bytes <= a) << "step " << step;
    }
  }
}

}  // namespace
}  // namespace epcomm
