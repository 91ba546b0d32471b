// Peers on other nodes are reached by the rail alone. The links refuse everything else; and with
// the windows of all other ranks made inaccessible the transport still works.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/node_layout.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"
#include "transport/host_link.h"

namespace epcomm {
namespace {

constexpr double kTimeout = 60;
constexpr NodeMap kMap{5, 2};

TEST(Hierarchical, LinksRefuseWhatIsNotTheirs) {
  testing::run_threads(kMap.num_ranks, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    auto window = make_host_window(*bootstrap, 4096, kTimeout);
    const NodeLink node(*window, kMap, rank);
    const RailLink rail(*window, kMap, rank);
    const int32_t mine = 100 + rank;
    for (int peer = 0; peer < kMap.num_ranks; ++peer) {
      const uint64_t offset = static_cast<uint64_t>(rank) * sizeof mine;
      if (kMap.same_node(rank, peer))
        EXPECT_EQ(node.at(peer, offset), window->peer(peer) + offset);
      else
        EXPECT_THROW(node.at(peer, offset), Error) << rank << " to " << peer;
      if (kMap.on_rail(rank, peer))
        rail.put(peer, offset, &mine, sizeof mine);
      else
        EXPECT_THROW(rail.put(peer, offset, &mine, sizeof mine), Error) << rank << " to " << peer;
    }
    bootstrap->barrier();
    const auto* words = reinterpret_cast<const int32_t*>(window->peer(rank));
    for (int source = 0; source < kMap.num_ranks; ++source)
      EXPECT_EQ(words[source], kMap.on_rail(source, rank) ? 100 + source : 0);
  });
}

// Makes the arenas (all but the control areas) of other ranks' windows inaccessible, except those
// of the own node and of the rail. Every rank has put its number at the start of its arena.
void close_other_windows(const NodeMap& map, int rank, size_t control_bytes) {
  std::ifstream maps("/proc/self/maps");
  std::vector<std::pair<char*, char*>> windows;  // all of them before any is changed
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin = 0, end = 0;
    if (line.find("memfd:epcomm-window") != std::string::npos &&
        std::sscanf(line.c_str(), "%lx-%lx", &begin, &end) == 2)
      windows.emplace_back(reinterpret_cast<char*>(begin), reinterpret_cast<char*>(end));
  }
  ASSERT_EQ(windows.size(), static_cast<size_t>(map.num_ranks));
  for (const auto& [begin, end] : windows) {
    char* arena = begin + control_bytes;
    const int owner = *reinterpret_cast<const int32_t*>(arena);
    if (map.same_node(rank, owner) || map.on_rail(rank, owner)) continue;
    ASSERT_EQ(::mprotect(arena, static_cast<size_t>(end - arena), PROT_NONE), 0);
  }
}

// Dispatches and combines a batch whose every token goes to every rank; true if y is right.
bool round_trip(testing::ForkedBootstrap& forked, const NodeMap& map, const char* transport) {
  // Not owned: it outlives the Buffer, which uses it only while it is made.
  const std::shared_ptr<Bootstrap> bootstrap(&forked, [](Bootstrap*) {});
  constexpr int kHidden = 64, kTokens = 20;
  const int ranks = map.num_ranks;
  auto options = testing::options_for(ranks, kHidden, ranks, kTokens, kTimeout);
  options.transport = transport;
  options.ranks_per_node = map.ranks_per_node;
  Buffer buffer(bootstrap, options);
  {
    const Allocation first = buffer.allocate(sizeof(int32_t));
    *reinterpret_cast<int32_t*>(first.data) = forked.rank();
    bootstrap->barrier();
    const Dims dims{ranks, ranks, 1, ranks, false, buffer.caps().forwards ? map.num_nodes() : 0};
    close_other_windows(map, forked.rank(), ControlLayout(dims).arena);
    bootstrap->barrier();
  }
  testing::Batch batch;
  batch.tokens = kTokens;
  batch.topk = ranks;
  batch.hidden = kHidden;
  for (int i = 0; i < kTokens * ranks; ++i) {
    batch.topk_idx.push_back(i % ranks);
    batch.weights.push_back(1.0f);
  }
  for (int i = 0; i < kTokens * kHidden; ++i)
    batch.x.push_back(static_cast<float>(1000 * forked.rank() + i));
  testing::Received recv;
  testing::route(buffer, batch, Layout::kToken, 1, recv);
  testing::dispatch(buffer, batch, recv);
  for (const bool weighted : {false, true}) {
    const auto y = testing::combine(buffer, batch, recv, weighted ? batch.weights.data() : nullptr);
    for (size_t i = 0; i < y.size(); ++i)
      if (y[i] != static_cast<float>(ranks) * batch.x[i]) return false;
  }
  bootstrap->barrier();
  return true;
}

TEST(Hierarchical, WindowsOffTheRailAreNeverTouched) {
  for (const NodeMap& map : {NodeMap{4, 2}, NodeMap{5, 2}, NodeMap{6, 3}}) {
    const auto status =
        testing::run_processes(map.num_ranks, kTimeout, [&](testing::ForkedBootstrap& bootstrap) {
          return round_trip(bootstrap, map, "hierarchical") && !::testing::Test::HasFailure();
        });
    for (int s : status) EXPECT_EQ(s, 0);
  }
}

// The same with a transport that stores everywhere: the closed windows do catch it.
TEST(Hierarchical, ClosedWindowsCatchAFlatTransport) {
  const auto status = testing::run_processes(4, kTimeout, [&](testing::ForkedBootstrap& bootstrap) {
    return round_trip(bootstrap, {4, 2}, "cpu");
  });
  // A sanitizer turns the signal into an exit status of its own; run_processes gives up to 2.
  for (int s : status) EXPECT_TRUE(WIFSIGNALED(s) || WEXITSTATUS(s) > 2) << s;
}

}  // namespace
}  // namespace epcomm
