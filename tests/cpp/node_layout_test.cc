#include "kernels/node_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace epcomm {
namespace {

const std::vector<NodeMap> kMaps = {{1, 0}, {4, 0}, {4, 9}, {4, 4}, {4, 2}, {6, 3},
                                    {6, 2}, {4, 1}, {5, 2}, {7, 3}, {7, 4}, {64, 8}};

TEST(NodeLayout, NodesAreConsecutiveRanks) {
  for (const NodeMap& map : kMaps) {
    int rank = 0;
    for (int b = 0; b < map.num_nodes(); ++b) {
      ASSERT_GT(map.size(b), 0);
      for (int i = 0; i < map.size(b); ++i, ++rank) {
        EXPECT_EQ(map.node(rank), b);
        EXPECT_EQ(map.local_rank(rank), i);
        EXPECT_EQ(map.first(b) + i, rank);
      }
    }
    EXPECT_EQ(rank, map.num_ranks);
  }
  // 5 ranks by 2: 2, 2, 1.
  const NodeMap uneven{5, 2};
  EXPECT_EQ(uneven.num_nodes(), 3);
  EXPECT_EQ(uneven.size(2), 1);
  EXPECT_EQ(uneven.rail_peer(1, 2), 4) << "no local rank 1 there: 1 mod 1 stands in";
  EXPECT_EQ(uneven.rail_peer(4, 0), 0);
  EXPECT_TRUE(uneven.on_rail(1, 4));
  EXPECT_TRUE(uneven.on_rail(4, 1)) << "it answers what it forwarded";
  EXPECT_FALSE(uneven.on_rail(0, 1)) << "one node";
  EXPECT_FALSE(uneven.on_rail(0, 3)) << "another local rank";
}

// Each source has one forwarder per remote node, of its local rank where there is one.
TEST(NodeLayout, OneForwarderPerSourceAndNode) {
  for (const NodeMap& map : kMaps)
    for (int s = 0; s < map.num_ranks; ++s)
      for (int b = 0; b < map.num_nodes(); ++b) {
        std::vector<int> forwarders;
        for (int r = map.first(b); r < map.first(b) + map.size(b); ++r) {
          if (map.forwards(r, s)) forwarders.push_back(r);
          EXPECT_EQ(map.on_rail(r, s), map.on_rail(s, r));
        }
        if (b == map.node(s)) {
          EXPECT_TRUE(forwarders.empty());
          continue;
        }
        ASSERT_EQ(forwarders, std::vector<int>{map.rail_peer(s, b)});
        if (map.local_rank(s) < map.size(b)) {
          EXPECT_EQ(map.local_rank(forwarders[0]), map.local_rank(s));
        }
      }
}

// At every step, nodes of equal size are served by at most one rank of a rail; every rank serves
// every other node once; the rails of a node start with different ones as long as there are any.
TEST(NodeLayout, ShiftedOrder) {
  for (const NodeMap& map : kMaps) {
    const int others = map.num_nodes() - 1;
    for (int r = 0; r < map.num_ranks; ++r) {
      std::set<int> served;
      for (int step = 0; step < others; ++step) served.insert(map.node_at(r, step));
      EXPECT_EQ(static_cast<int>(served.size()), others);
      EXPECT_EQ(served.count(map.node(r)), 0u);
    }
    for (int step = 0; step < others; ++step)
      for (int rail = 0; rail < map.stride(); ++rail) {
        std::set<int> served;
        int ranks = 0;
        for (int b = 0; b < map.num_nodes(); ++b)
          if (rail < map.size(b)) {
            served.insert(map.node_at(map.first(b) + rail, step));
            ++ranks;
          }
        EXPECT_EQ(static_cast<int>(served.size()), ranks);
      }
    for (int b = 0; b < map.num_nodes() && others > 0; ++b) {
      std::set<int> starts;
      for (int i = 0; i < map.size(b); ++i) starts.insert(map.node_at(map.first(b) + i, 0));
      EXPECT_EQ(static_cast<int>(starts.size()), std::min(map.size(b), others));
    }
  }
}

TEST(NodeLayout, ChunksCoverEveryRowOnce) {
  for (int64_t wanted : {1, 3, 64})
    for (int64_t total : {0, 1, 2, 3, 63, 64, 65, 1000}) {
      const Chunks chunks = Chunks::of(wanted, 1000);
      EXPECT_EQ(chunks.rows, wanted);
      int64_t at = 0;
      for (int32_t c = 0; c < chunks.count(total); ++c) {
        EXPECT_EQ(chunks.begin(c), at);
        ASSERT_GT(chunks.end(c, total), at);
        at = chunks.end(c, total);
        EXPECT_EQ(chunks.covering(at), c + 1);
        EXPECT_EQ(chunks.covering(chunks.begin(c) + 1), c + 1);
      }
      EXPECT_EQ(at, total);
    }
  EXPECT_EQ(Chunks::of(1, 65535).rows, 1);
  EXPECT_EQ(Chunks::of(1, 65536).rows, 2) << "more steps than a signal counts";
  EXPECT_LE(Chunks::of(1, int64_t{1} << 31).count(int64_t{1} << 31), Chunks::kMaxSteps);
}

TEST(NodeLayout, SignalsGrowWithChunksAndCalls) {
  uint64_t last = 0;
  for (uint64_t epoch : {1, 2, 3})
    for (int32_t chunks : {0, 1, 65535}) {
      EXPECT_GT(Chunks::signal(epoch, chunks), last);
      last = Chunks::signal(epoch, chunks);
    }
}

TEST(NodeLayout, ForwardRecordsDoNotOverlap) {
  for (int topk : {1, 3, 8, 32})
    for (int size : {1, 2, 8}) {
      const ForwardLayout layout(topk, size);
      EXPECT_EQ(layout.record_bytes % 16, 0u);
      constexpr int kRecords = 3;
      std::vector<int32_t> block(kRecords * layout.record_bytes / sizeof(int32_t), -1);
      auto each = [&](auto&& visit) {
        for (int n = 0; n < kRecords; ++n) {
          char* record = layout.record(block.data(), n);
          for (int k = 0; k < topk; ++k) {
            visit(layout.meta.row(record, 0)[k]);
            visit(layout.meta.topk_idx(record, 0)[k]);
            visit(reinterpret_cast<int32_t*>(layout.meta.topk_weights(record, 0))[k]);
          }
          visit(*layout.meta.token(record, 0));
          for (int j = 0; j < size; ++j) visit(layout.slot(record)[j]);
        }
      };
      int32_t next = 0;
      each([&](int32_t& word) { word = next++; });
      EXPECT_EQ(next, kRecords * (3 * topk + 1 + size));
      int32_t expected = 0;
      each([&](int32_t& word) { EXPECT_EQ(word, expected++); });
    }
}

// Counts as routing announces them: tokens of each source to each rank, and to each node, which are
// at least the most that one of its ranks receives and at most all of them together.
struct Counts {
  std::vector<int32_t> rank, node;
  Counts(const NodeMap& map, unsigned seed) {
    std::mt19937 random(seed);
    for (int s = 0; s < map.num_ranks; ++s)
      for (int b = 0; b < map.num_nodes(); ++b) {
        int32_t most = 0, sum = 0;
        for (int i = 0; i < map.size(b); ++i) {
          rank.push_back(static_cast<int32_t>(random() % 5));
          most = std::max(most, rank.back());
          sum += rank.back();
        }
        node.push_back(most +
                       static_cast<int32_t>(random() % static_cast<unsigned>(sum - most + 1)));
      }
  }
};

// The rows that everything claims in an area, one by one: none twice, none left over.
class Area {
 public:
  explicit Area(int64_t rows) : used_(static_cast<size_t>(rows), false) {}
  void claim(int64_t begin, int64_t rows) {
    for (int64_t i = begin; i < begin + rows; ++i) {
      ASSERT_GE(i, 0);
      ASSERT_LT(i, static_cast<int64_t>(used_.size()));
      EXPECT_FALSE(used_[static_cast<size_t>(i)]) << "row " << i << " is used twice";
      used_[static_cast<size_t>(i)] = true;
    }
  }
  ~Area() { EXPECT_EQ(std::count(used_.begin(), used_.end(), false), 0); }

 private:
  std::vector<bool> used_;
};

TEST(NodeLayout, ForwardingAreaHoldsEveryRowOnce) {
  for (const NodeMap& map : kMaps)
    for (unsigned seed = 0; seed < 3; ++seed) {
      const Counts counts(map, seed);
      const NodePlan plan{map, counts.rank.data(), counts.node.data()};
      for (int r = 0; r < map.num_ranks; ++r) {
        Area area(plan.forward_rows(r));
        int64_t received = 0;
        for (int s = 0; s < map.num_ranks; ++s) {
          EXPECT_EQ(plan.token_base(s, r), received);
          received += plan.tokens(s, r);
          if (map.forwards(r, s))
            area.claim(plan.forward_base(r, s), plan.node_tokens(s, map.node(r)));
        }
        EXPECT_EQ(plan.received(r), received);
      }
    }
}

TEST(NodeLayout, CombineAreaHoldsEveryRowOnce) {
  for (const NodeMap& map : kMaps)
    for (unsigned seed = 0; seed < 3; ++seed) {
      const Counts counts(map, seed);
      const NodePlan plan{map, counts.rank.data(), counts.node.data()};
      for (int r = 0; r < map.num_ranks; ++r) {
        Area area(plan.combine_rows(r));
        const int own = map.node(r);
        for (int c = map.first(own); c < map.first(own) + map.size(own); ++c) {
          const int64_t begin = plan.contributor_base(r, c);
          for (int s = 0; s < map.num_ranks; ++s)
            if (s == r || map.forwards(r, s))
              area.claim(begin + plan.contribution_base(r, c, s), plan.tokens(s, c));
        }
        for (int b = 0; b < map.num_nodes(); ++b)
          if (b != own) area.claim(plan.returned_base(r, b), plan.node_tokens(r, b));
      }
    }
}

}  // namespace
}  // namespace epcomm
