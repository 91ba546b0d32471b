// Which pairs of GPUs are found bad, over a fake driver, by what each process sees.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <ostream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "epcomm/error.h"
#include "epcomm/peer_access.h"
#include "tests/cpp/fake_driver.h"
#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using namespace testing;  // NOLINT: the helpers of these tests

constexpr double kTimeout = 20;
using Pairs = std::set<std::pair<int, int>>;
using Ids = std::vector<int>;

struct Case {
  std::string name;
  std::vector<Ids> visible;  // per rank: ids of the GPUs that it sees, by ordinal
  Ids current;               // per rank: its ordinal
  Pairs no_access = {};      // ids
  Ids mig = {};              // ids
  bool nvml = true;
  Pairs bad = {};           // ranks
  std::string reason = {};  // part of every bad pair's
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

FakeMachine machine_of(const Case& c, int rank) {
  FakeMachine machine;
  for (int id : c.visible[static_cast<size_t>(rank)]) {
    FakeGpu gpu{id};
    if (std::count(c.mig.begin(), c.mig.end(), id) != 0) gpu.name = "NVIDIA H200 MIG 1g.18gb";
    machine.visible.push_back(gpu);
  }
  machine.current = c.current[static_cast<size_t>(rank)];
  machine.no_access.assign(c.no_access.begin(), c.no_access.end());
  machine.nvml = c.nvml;
  return machine;
}

// What each rank was told; all the same.
PeerAccess check(int size, const std::function<FakeMachine(int rank)>& machine,
                 bool share_gpu = false) {
  std::vector<PeerAccess> told(static_cast<size_t>(size));
  run_threads(size, kTimeout, [&](std::shared_ptr<Bootstrap> b) {
    set_fake_machine(machine(b->rank()));
    told[static_cast<size_t>(b->rank())] = check_peer_access(*b, kTimeout, share_gpu);
    b->barrier();
  });
  for (const PeerAccess& one : told) {
    EXPECT_EQ(one.text(), told[0].text());
    EXPECT_EQ(one.bad_pairs.size(), told[0].bad_pairs.size());
  }
  EXPECT_EQ(fake_holdings(), FakeHoldings{});
  return told[0];
}

const Pairs kAllOfTwo = {{0, 1}, {1, 0}};
const std::vector<Case> kCases = {
    {.name = "all_visible", .visible = {{1, 2, 3}, {1, 2, 3}, {1, 2, 3}}, .current = {0, 1, 2}},
    {.name = "permuted", .visible = {{3, 1, 2}, {2, 3, 1}, {1, 2, 3}}, .current = {0, 0, 0}},
    {.name = "one_each", .visible = {{1}, {2}, {3}}, .current = {0, 0, 0}},
    {.name = "one_each_without_nvml", .visible = {{1}, {2}}, .current = {0, 0}, .nvml = false},
    {.name = "same_ordinal_is_not_the_same_gpu", .visible = {{4, 5}, {5, 4}}, .current = {0, 0}},
    {.name = "same_gpu",
     .visible = {{1, 2}, {1, 2}, {1, 2}},
     .current = {0, 1, 0},
     .bad = {{0, 2}, {2, 0}},
     .reason = "both ranks use the same GPU GPU-00000000-0000-0000-0000-000000000001"},
    {.name = "same_gpu_by_other_ordinals",
     .visible = {{1, 2}, {2, 1}},
     .current = {0, 1},
     .bad = kAllOfTwo,
     .reason = "set_device"},
    {.name = "mig",
     .visible = {{1}, {2}, {3}},
     .current = {0, 0, 0},
     .mig = {2},
     .bad = {{0, 1}, {1, 0}, {1, 2}, {2, 1}},
     .reason = "NVIDIA H200 MIG 1g.18gb"},
    {.name = "no_access_one_way",
     .visible = {{1, 2, 3}, {1, 2, 3}, {1, 2, 3}},
     .current = {0, 1, 2},
     .no_access = {{3, 1}},
     .bad = {{2, 0}},
     .reason = "CUDA reports no peer access from 0000:03:00.0 to 0000:01:00.0"},
    {.name = "two_islands",
     .visible = {{1, 2, 3, 4}, {4, 3, 2, 1}, {1, 2, 3, 4}, {1, 2, 3, 4}},
     .current = {0, 2, 2, 3},
     .no_access = {{1, 3}, {1, 4}, {2, 3}, {2, 4}, {3, 1}, {4, 1}, {3, 2}, {4, 2}},
     .bad = {{0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 0}, {3, 0}, {2, 1}, {3, 1}},
     .reason = "CUDA reports"},
    {.name = "hidden_without_access",
     .visible = {{1}, {2}},
     .current = {0, 0},
     .no_access = {{1, 2}, {2, 1}},
     .bad = kAllOfTwo,
     .reason = "NVML reports no peer access from 0000:"},
    {.name = "partly_hidden",
     .visible = {{1, 2}, {2}, {3}},
     .current = {0, 0, 0},
     .no_access = {{1, 2}, {2, 1}, {3, 2}},
     .bad = {{0, 1}, {1, 0}, {2, 1}},
     .reason = "no peer access from"},
    {.name = "one_rank", .visible = {{7, 8}}, .current = {1}},
};

class VisibleDevices : public ::testing::TestWithParam<Case> {};

TEST_P(VisibleDevices, ListsAllBadPairsOnAllRanks) {
  const Case& c = GetParam();
  const int size = static_cast<int>(c.visible.size());
  const PeerAccess access = check(size, [&](int rank) { return machine_of(c, rank); });
  EXPECT_EQ(access.failure, "");
  Pairs bad;
  for (const BadPair& pair : access.bad_pairs) {
    bad.emplace(pair.from, pair.to);
    EXPECT_NE(pair.reason.find(c.reason), std::string::npos) << pair.reason;
    const std::string listed =
        "rank " + std::to_string(pair.from) + " -> rank " + std::to_string(pair.to) + ": ";
    EXPECT_NE(access.text().find(listed + pair.reason), std::string::npos) << access.text();
  }
  EXPECT_EQ(bad, c.bad) << access.text();
  EXPECT_EQ(access.good(), c.bad.empty());
  EXPECT_EQ(access.text().empty(), c.bad.empty());
}

INSTANTIATE_TEST_SUITE_P(Cases, VisibleDevices, ::testing::ValuesIn(kCases),
                         [](const auto& one) { return one.param.name; });

TEST(PeerAccess, OneGpuMayBeSharedWhereThatIsAllowed) {
  const auto machine = [](int) {
    FakeMachine m;
    m.visible = {{1}};
    return m;
  };
  EXPECT_FALSE(check(2, machine).good());
  EXPECT_TRUE(check(2, machine, true).good());
}

// Everything is announced, and then a mapping is refused.
TEST(PeerAccess, ATrialWindowFindsWhatNobodyAnnounces) {
  const PeerAccess access = check(3, [](int rank) {
    FakeMachine m;
    m.visible = {{rank}};
    m.nvml = false;
    if (rank == 2) m.failing = "MemSetAccess", m.successes = 1;
    return m;
  });
  EXPECT_TRUE(access.bad_pairs.empty());
  EXPECT_NE(access.text().find("on rank 2: window of rank 0: cuMemSetAccess"), std::string::npos)
      << access.text();
}

TEST(PeerAccess, ADriverThatFailsIsReportedByAllRanks) {
  for (const char* call : {"CurrentDevice", "DeviceCanAccessPeer"}) {
    const PeerAccess access = check(2, [call](int rank) {
      FakeMachine m;
      m.visible = {{0}, {1}};
      m.current = rank;
      if (rank == 1) m.failing = call;
      return m;
    });
    EXPECT_NE(access.text().find("on rank 1: cu" + std::string(call)), std::string::npos)
        << access.text();
  }
}

// Nodes {0, 1}, {2, 3}, {4}, of machines that see nothing of each other. What each rank was told.
std::vector<PeerAccess> check_nodes(const std::function<void(int rank, FakeMachine& m)>& change) {
  std::vector<PeerAccess> told(5);
  run_threads(5, kTimeout, [&](std::shared_ptr<Bootstrap> b) {
    const int rank = b->rank();
    FakeMachine m;
    for (int id = rank / 2 * 2; id < std::min(rank / 2 * 2 + 2, 5); ++id) m.visible.push_back({id});
    m.current = rank % 2;
    for (int from = 0; from < 5; ++from)
      for (int to = 0; to < 5; ++to)
        if (from / 2 != to / 2) m.no_access.emplace_back(from, to);
    change(rank, m);
    set_fake_machine(m);
    told[static_cast<size_t>(rank)] = check_peer_access_in_nodes(*b, kTimeout, 2);
    b->barrier();
  });
  EXPECT_EQ(fake_holdings(), FakeHoldings{});
  return told;
}

TEST(PeerAccessInNodes, AsksForNothingBetweenThem) {
  for (const PeerAccess& access : check_nodes([](int, FakeMachine&) {}))
    EXPECT_TRUE(access.good()) << access.text();
}

TEST(PeerAccessInNodes, ANodeThatHasNoneIsAloneWithIt) {
  const auto told = check_nodes([](int, FakeMachine& m) { m.no_access.emplace_back(3, 2); });
  for (int r : {0, 1, 4}) EXPECT_TRUE(told[static_cast<size_t>(r)].good()) << r;
  for (int r : {2, 3}) {
    const PeerAccess& access = told[static_cast<size_t>(r)];
    ASSERT_EQ(access.bad_pairs.size(), 1u) << access.text();
    EXPECT_EQ(access.bad_pairs[0].from, 1);  // of the node
    EXPECT_EQ(access.bad_pairs[0].to, 0);
  }
}

TEST(PeerAccessInNodes, AFailureOfOneNodeIsNotWaitedForByOthers) {
  const auto told = check_nodes([](int rank, FakeMachine& m) {
    if (rank == 0) m.failing = "CurrentDevice";
  });
  for (int r = 0; r < 5; ++r)
    EXPECT_EQ(told[static_cast<size_t>(r)].good(), r >= 2) << told[static_cast<size_t>(r)].text();
}

}  // namespace
}  // namespace epcomm
