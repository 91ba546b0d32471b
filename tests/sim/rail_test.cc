// Which tokens go to which node, and what crosses the network between nodes of GPUs, byte by byte:
// a row once per (token, remote node) each way, the entries of calls, and nothing else. Counted by
// the simulated network cards.
#include "kernels/rail.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kernels/cuda_error.h"
#include "kernels/link.h"
#include "kernels/node_layout.h"
#include "kernels/rail_layout.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"
#include "tests/sim/nic.h"

namespace epcomm {
namespace {

using testing::Batch;
using testing::Received;

constexpr double kTimeout = 60;
constexpr int kExpertsPerRank = 3, kTopk = 3, kHidden = 8, kTokens = 21;
constexpr int kRowBytes = kHidden * static_cast<int>(sizeof(float));

enum class Routing { kUniform, kSkewed, kNodeLimited };

Batch make_batch(const NodeMap& map, int rank, Routing routing) {
  std::mt19937 random(static_cast<unsigned>(17 + rank));
  auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  Batch batch{kTokens, kTopk, kHidden, {}, {}, {}};
  for (int t = 0; t < kTokens; ++t) {
    const int node = below(map.num_nodes());
    for (int k = 0; k < kTopk; ++k) {
      int expert = below(map.num_ranks * kExpertsPerRank);
      if (routing == Routing::kSkewed) expert = below(4) == 0 ? -1 : std::min(expert, 2);
      if (routing == Routing::kNodeLimited)
        expert = map.first(node) * kExpertsPerRank + below(map.size(node) * kExpertsPerRank);
      batch.topk_idx.push_back(expert);
      batch.weights.push_back(1.0f);
    }
  }
  batch.x.assign(static_cast<size_t>(kTokens * kHidden), 1.0f);
  return batch;
}

// Bytes of all ranks' rows: of a dispatch, with what travels beside them, and of a combine.
struct RailBytes {
  uint64_t dispatch = 0, combine = 0;
};

RailBytes expected(const NodeMap& map, Routing routing) {
  RailBytes bytes;
  for (int rank = 0; rank < map.num_ranks; ++rank) {
    const Batch batch = make_batch(map, rank, routing);
    for (int t = 0; t < kTokens; ++t) {
      std::set<int> nodes;
      for (int k = 0; k < kTopk; ++k)
        if (const int e = batch.topk_idx[static_cast<size_t>(t * kTopk + k)]; e >= 0)
          nodes.insert(map.node(e / kExpertsPerRank));
      nodes.erase(map.node(rank));
      for (int node : nodes) {
        bytes.dispatch += RailRow(kTopk, map.size(node), kRowBytes, 0).bytes;
        bytes.combine += kRowBytes;
      }
    }
  }
  return bytes;
}

// Batches of more tokens than a block has threads, and empty ones.
TEST(RailRoute, SlotsFollowTheTokens) {
  constexpr int kRanks = 5, kRank = 3, kExperts = 7, kSlots = 4;
  const NodeMap map{kRanks, 2};
  const int nodes = map.num_nodes();
  std::vector<int32_t> owner;
  for (int e = 0; e < kExperts; ++e) owner.push_back(e * e % kRanks);
  std::mt19937 random(5);
  for (int tokens : {0, 1, 31, 1023, 1024, 1025, 2600, 4096, 9001}) {
    std::vector<int32_t> idx;
    for (int i = 0; i < tokens * kSlots; ++i)
      idx.push_back(random() % 3 == 0 ? static_cast<int32_t>(random() % kExperts) : -1);
    const auto cells = static_cast<size_t>(tokens * nodes);
    std::vector<int32_t> slot(cells, -7), token(cells, -7);
    std::vector<int32_t> count(static_cast<size_t>(kRanks * nodes), -7);
    PlanView plan;
    plan.topk_idx = idx.data();
    plan.node_slot = slot.data();
    plan.node_token = token.data();
    plan.node_count = count.data();
    launch_node_slots(map, kRank, tokens, kSlots, {owner.data(), nullptr}, plan, nullptr);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (int b = 0; b < nodes; ++b) {
      int32_t next = 0;
      for (int t = 0; t < tokens; ++t) {
        const auto begin = idx.begin() + t * kSlots;
        const bool goes = std::any_of(begin, begin + kSlots, [&](int32_t e) {
          return e >= 0 && map.node(owner[static_cast<size_t>(e)]) == b;
        });
        ASSERT_EQ(slot[static_cast<size_t>(t * nodes + b)], goes ? next : -1) << t;
        if (goes) {
          ASSERT_EQ(token[static_cast<size_t>(b * tokens + next)], t);
          ++next;
        }
      }
      EXPECT_EQ(count[static_cast<size_t>(kRank * nodes + b)], next);
    }
  }
}

// What all ranks put in a call that all of them make.
template <class Call>
uint64_t put_bytes_of(Bootstrap& bootstrap, Call call) {
  bootstrap.barrier();
  const uint64_t before = sim::Nic::put_bytes();
  bootstrap.barrier();
  call();
  bootstrap.barrier();
  const uint64_t after = sim::Nic::put_bytes();
  bootstrap.barrier();  // nobody goes on to another call before all have read it
  return after - before;
}

class RailBytesTest : public ::testing::TestWithParam<NodeMap> {};

TEST_P(RailBytesTest, OneRowPerTokenAndRemoteNode) {
  const NodeMap map = GetParam();
  const auto ranks = static_cast<uint64_t>(map.num_ranks);
  const uint64_t entries = ranks * (ranks - 1) * sizeof(LinkEntry);
  for (Routing routing : {Routing::kUniform, Routing::kSkewed, Routing::kNodeLimited}) {
    const RailBytes rows = expected(map, routing);
    testing::run_threads(map.num_ranks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
      BufferOptions options =
          testing::options_for(map.num_ranks * kExpertsPerRank, kHidden, kTopk, kTokens, kTimeout);
      options.transport = "hierarchical";
      options.ranks_per_node = map.ranks_per_node;
      options.transport_options = {{"chunk_tokens", "4"}};
      Buffer buffer(bootstrap, options);
      const Batch batch = make_batch(map, bootstrap->rank(), routing);
      Received recv;
      auto bytes_of = [&](auto call) { return put_bytes_of(*bootstrap, call); };
      testing::route(buffer, batch, Layout::kToken, 1, recv);
      EXPECT_EQ(bytes_of([&] { testing::dispatch(buffer, batch, recv); }), rows.dispatch + entries);
      std::vector<float> y;
      EXPECT_EQ(bytes_of([&] { y = testing::combine(buffer, batch, recv); }),
                rows.combine + entries);
      // The weights of a combine go to every rank.
      const uint64_t weights = ranks * (ranks - 1) * kTokens * kTopk * sizeof(float);
      EXPECT_EQ(bytes_of([&] { testing::combine(buffer, batch, recv, batch.weights.data()); }),
                rows.combine + weights + entries);
      // Every token has come to each of its ranks.
      for (int t = 0; t < kTokens; ++t) {
        std::set<int> owners;
        for (int k = 0; k < kTopk; ++k)
          if (const int e = batch.topk_idx[static_cast<size_t>(t * kTopk + k)]; e >= 0)
            owners.insert(e / kExpertsPerRank);
        EXPECT_EQ(y[static_cast<size_t>(t * kHidden)], static_cast<float>(owners.size()));
      }
    });
  }
}

// Ahead of the counts, one rank has room for a token too few: that is known before any row is put.
TEST_P(RailBytesTest, EntriesAloneWhereOneRankHasNoRoom) {
  const NodeMap map = GetParam();
  const auto ranks = static_cast<uint64_t>(map.num_ranks);
  const uint64_t entries = ranks * (ranks - 1) * sizeof(LinkEntry);
  const RailBytes rows = expected(map, Routing::kUniform);
  testing::run_threads(map.num_ranks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    BufferOptions options =
        testing::options_for(map.num_ranks * kExpertsPerRank, kHidden, kTopk, kTokens, kTimeout);
    options.transport = "hierarchical";
    options.ranks_per_node = map.ranks_per_node;
    Buffer buffer(bootstrap, options);
    const Batch batch = make_batch(map, rank, Routing::kUniform);
    const Batch skewed = make_batch(map, rank, Routing::kSkewed);
    auto bytes_of = [&](auto call) { return put_bytes_of(*bootstrap, call); };
    Received known, recv, other;
    testing::route(buffer, batch, Layout::kToken, 1, known);
    for (int missing_at = -1; missing_at < map.num_ranks; ++missing_at) {
      testing::route(buffer, batch, Layout::kToken, 1, recv, true);
      ASSERT_TRUE(recv.plan.result.unsettled);
      const int guess = known.num_rows - (missing_at == rank ? 1 : 0);
      recv.plan.result.num_recv_tokens = recv.num_rows = guess;
      const bool fits = missing_at < 0;
      EXPECT_EQ(bytes_of([&] { testing::dispatch(buffer, batch, recv); }),
                (fits ? rows.dispatch : 0) + entries);
      ASSERT_EQ(buffer.settle(recv.plan), fits);
      EXPECT_FALSE(recv.plan.result.unsettled);
      EXPECT_EQ(recv.plan.result.num_recv_tokens, known.num_rows);
      if (!fits) {
        recv.num_rows = recv.plan.result.num_recv_rows;
        EXPECT_EQ(bytes_of([&] { testing::dispatch(buffer, batch, recv); }),
                  rows.dispatch + entries);
      }
      for (int i = 0; i < recv.num_rows * kHidden; ++i) ASSERT_EQ(recv.row(0, kHidden)[i], 1.0f);
      // The plan lasts while others are made and used.
      testing::route(buffer, skewed, Layout::kToken, 1, other);
      testing::dispatch(buffer, skewed, other);
      const std::vector<float> y = testing::combine(buffer, batch, recv);
      for (int t = 0; t < kTokens; ++t) {
        std::set<int> owners;
        for (int k = 0; k < kTopk; ++k)
          owners.insert(batch.topk_idx[static_cast<size_t>(t * kTopk + k)] / kExpertsPerRank);
        ASSERT_EQ(y[static_cast<size_t>(t * kHidden)], static_cast<float>(owners.size())) << t;
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Nodes, RailBytesTest,
                         ::testing::Values(NodeMap{4, 2}, NodeMap{4, 1}, NodeMap{5, 2},
                                           NodeMap{3, 3}),
                         [](const auto& info) {
                           return std::to_string(info.param.num_ranks) + "by" +
                                  std::to_string(info.param.ranks_per_node);
                         });

}  // namespace
}  // namespace epcomm

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  auto& tested = epcomm::testing::tested_transport;
  tested.begin_rank = [](int rank) { EPCOMM_CUDA_TRY(cudaSetDevice(rank)); };
  tested.finish_calls = [] { EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess); };
  return RUN_ALL_TESTS();
}
