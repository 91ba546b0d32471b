// route, dispatch and combine with ranks as threads. All values are small integers, so sums are
// exact whatever their order. Under ThreadSanitizer the same tests check the memory order of the
// transport.
#include "epcomm/buffer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "core/expert_map.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using testing::Batch;
using testing::Received;
using testing::run_threads;

constexpr double kTimeout = 60;

struct Case {
  int ranks, experts, topk, hidden, max_tokens;
};

// The same on every rank: what all ranks send in one round. Includes ranks without tokens, -1 holes
// and experts named twice by one token.
std::vector<Batch> make_round(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::vector<Batch> all(static_cast<size_t>(c.ranks));
  for (int r = 0; r < c.ranks; ++r) {
    Batch& b = all[static_cast<size_t>(r)];
    b.tokens = below(5) == 0 ? 0 : below(c.max_tokens + 1);
    b.topk = c.topk;
    b.hidden = c.hidden;
    const bool one_expert = below(8) == 0;
    for (int i = 0; i < b.tokens * c.topk; ++i) {
      b.topk_idx.push_back(one_expert ? 0 : below(6) == 0 ? -1 : below(c.experts));
      b.weights.push_back(static_cast<float>(1 << below(4)));
    }
    for (int t = 0; t < b.tokens; ++t)
      for (int h = 0; h < c.hidden; ++h)
        b.x.push_back(static_cast<float>(1000 * r + 7 * t + h % 5 + 1));
  }
  return all;
}

// The distinct experts of one token, in the order of their first slot.
std::vector<int> experts_of(const Batch& b, int t) {
  std::vector<int> experts;
  for (int k = 0; k < b.topk; ++k) {
    const int e = b.topk_idx[static_cast<size_t>(t * b.topk + k)];
    if (e >= 0 && std::find(experts.begin(), experts.end(), e) == experts.end())
      experts.push_back(e);
  }
  return experts;
}

// Sum of the weights that token t gives to expert e.
float weight_of(const Batch& b, int t, int e) {
  float sum = 0;
  for (int k = 0; k < b.topk; ++k) {
    const size_t i = static_cast<size_t>(t * b.topk + k);
    if (b.topk_idx[i] == e) sum += b.weights[i];
  }
  return sum;
}

bool row_is(const float* row, const Batch& source, int t) {
  return std::equal(row, row + source.hidden, source.x.begin() + t * source.hidden);
}

void check_token_layout(const std::vector<Batch>& all, const ExpertMap& map, int rank,
                        const Received& recv) {
  int n = 0;
  for (const Batch& source : all)
    for (int t = 0; t < source.tokens; ++t) {
      const auto experts = experts_of(source, t);
      if (std::none_of(experts.begin(), experts.end(), [&](int e) { return map.rank(e) == rank; }))
        continue;
      ASSERT_LT(n, recv.num_rows);
      EXPECT_TRUE(row_is(recv.row(n, source.hidden), source, t))
          << "row " << n << " on rank " << rank;
      for (int k = 0; k < source.topk; ++k) {
        const size_t from = static_cast<size_t>(t * source.topk + k),
                     to = static_cast<size_t>(n * source.topk + k);
        const int e = source.topk_idx[from];
        const bool here = e >= 0 && map.rank(e) == rank;
        EXPECT_EQ(recv.topk_idx[to], here ? map.local(e) : -1);
        EXPECT_EQ(recv.weights[to], here ? source.weights[from] : 0.0f);
      }
      ++n;
    }
  EXPECT_EQ(recv.num_rows, n);
  EXPECT_EQ(recv.plan.result.num_recv_tokens, n);
}

// group_rows: rows of each expert's group (padded layout), or 0 where groups follow each other.
void check_expert_layout(const std::vector<Batch>& all, const ExpertMap& map, int rank,
                         int alignment, int group_rows, const Received& recv) {
  int64_t row = 0;
  for (int e = 0; e < map.num_experts(); ++e) {
    if (map.rank(e) != rank) continue;
    const size_t local = static_cast<size_t>(map.local(e));
    EXPECT_EQ(recv.plan.view.expert_offset[local], row);
    const int64_t start = row;
    for (const Batch& source : all)
      for (int t = 0; t < source.tokens; ++t) {
        const auto experts = experts_of(source, t);
        if (std::find(experts.begin(), experts.end(), e) == experts.end()) continue;
        ASSERT_LT(row, recv.num_rows);
        EXPECT_TRUE(row_is(recv.row(row, source.hidden), source, t))
            << "row " << row << " on rank " << rank;
        EXPECT_EQ(recv.weights[static_cast<size_t>(row)], weight_of(source, t, e));
        if (group_rows == 0) {
          EXPECT_EQ(recv.topk_idx[static_cast<size_t>(row)], map.local(e));
        }
        ++row;
      }
    EXPECT_EQ(recv.plan.result.tokens_per_expert[local], row - start);
    const int64_t end =
        group_rows != 0 ? start + group_rows : (row + alignment - 1) / alignment * alignment;
    for (; row < end; ++row) {
      EXPECT_EQ(recv.weights[static_cast<size_t>(row)], 0.0f);
      if (group_rows == 0) {
        EXPECT_EQ(recv.topk_idx[static_cast<size_t>(row)], -1);
      }
    }
  }
  EXPECT_EQ(recv.num_rows, row);
}

// Every row becomes row * (global expert + 1), or row * (rank + 1) where a row belongs to a rank.
void run_experts(const ExpertMap& map, int rank, int hidden, Received& recv) {
  if (recv.plan.layout == Layout::kToken) {
    for (int64_t i = 0; i < recv.num_rows; ++i)
      for (int h = 0; h < hidden; ++h) recv.row(i, hidden)[h] *= static_cast<float>(rank + 1);
    return;
  }
  for (int e = 0; e < map.num_experts(); ++e) {
    if (map.rank(e) != rank) continue;
    const size_t local = static_cast<size_t>(map.local(e));
    const int64_t begin = recv.plan.view.expert_offset[local];
    for (int64_t i = begin; i < begin + recv.plan.result.tokens_per_expert[local]; ++i)
      for (int h = 0; h < hidden; ++h) recv.row(i, hidden)[h] *= static_cast<float>(e + 1);
  }
}

// What combine must give for one token, as a factor of its row.
float combined_factor(const Batch& b, int t, const ExpertMap& map, Layout layout, bool weighted) {
  float factor = 0;
  std::set<int> ranks;
  for (int e : experts_of(b, t)) {
    const bool by_rank = layout == Layout::kToken;
    const float row = static_cast<float>(by_rank ? map.rank(e) + 1 : e + 1);
    if (weighted)
      factor += weight_of(b, t, e) * row;
    else if (!by_rank || ranks.insert(map.rank(e)).second)
      factor += row;
  }
  return factor;
}

void check_combined(const Batch& b, const ExpertMap& map, Layout layout, bool weighted,
                    const std::vector<float>& y) {
  for (int t = 0; t < b.tokens; ++t) {
    const float factor = combined_factor(b, t, map, layout, weighted);
    for (int h = 0; h < b.hidden; ++h) {
      const size_t i = static_cast<size_t>(t * b.hidden + h);
      ASSERT_EQ(y[i], factor * b.x[i]) << "token " << t << (weighted ? ", weighted" : "");
    }
  }
}

// Row n of rank r is 1000 * r + n, a little more in each column.
float by_token_value(int r, int n, int column) {
  return static_cast<float>(1000 * r + n + 100000 * column);
}

void check_by_token(Buffer& buffer, const Batch& b, const Received& recv) {
  const int width = (b.topk + 3) / 4 * 4;
  std::vector<float> x;
  for (int n = 0; n < recv.plan.result.num_recv_tokens; ++n)
    for (int i = 0; i < width; ++i) x.push_back(by_token_value(buffer.rank(), n, i));
  const std::vector<float> y = testing::combine_by_token(buffer, b, recv, x, width);
  for (int t = 0; t < b.tokens; ++t)
    for (int i = 0; i < width; ++i) {
      float sum = 0;
      for (int r = 0; r < buffer.num_ranks(); ++r) {
        const int slot = recv.plan.view.slot[t * buffer.num_ranks() + r];
        if (slot >= 0) sum += by_token_value(r, slot, i);
      }
      ASSERT_EQ(y[static_cast<size_t>(t * width + i)], sum) << "token " << t;
    }
}

class BufferLayouts : public ::testing::TestWithParam<Layout> {};

TEST_P(BufferLayouts, DispatchAndCombineAreExact) {
  const Layout layout = GetParam();
  // The last has rows, and enough of them, that a GPU transport moves in several pieces per warp.
  for (const Case& c : {Case{1, 3, 2, 4, 9}, Case{2, 5, 3, 8, 17}, Case{4, 10, 4, 4, 12},
                        Case{2, 6, 3, 5000, 60}}) {
    const unsigned rounds = c.hidden > 1000 ? 3 : 12;
    run_threads(c.ranks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
      const int rank = bootstrap->rank();
      Buffer buffer(bootstrap,
                    testing::options_for(c.experts, c.hidden, c.topk, c.max_tokens, kTimeout));
      ASSERT_EQ(buffer.transport(), testing::tested_transport.name);
      const ExpertMap map(c.experts, c.ranks, {});
      for (unsigned round = 0; round < rounds; ++round) {
        const auto all = make_round(c, round);
        const Batch& mine = all[static_cast<size_t>(rank)];
        const int alignment = layout == Layout::kExpert ? 1 << round % 4 : 1;
        Received recv;
        testing::route(buffer, mine, layout, alignment, recv);
        for (int replay = 0; replay < 2; ++replay) {
          testing::dispatch(buffer, mine, recv);
          if (layout == Layout::kToken)
            check_token_layout(all, map, rank, recv);
          else
            check_expert_layout(all, map, rank, alignment,
                                layout == Layout::kPadded ? c.ranks * c.max_tokens : 0, recv);
          run_experts(map, rank, c.hidden, recv);
          check_combined(mine, map, layout, false, testing::combine(buffer, mine, recv));
          check_combined(mine, map, layout, true,
                         testing::combine(buffer, mine, recv, testing::address(mine.weights)));
          check_by_token(buffer, mine, recv);
        }
        EXPECT_THROW(testing::combine_by_token(buffer, mine, recv, {}, 8), InvalidArgument);
      }
    });
  }
}

INSTANTIATE_TEST_SUITE_P(All, BufferLayouts,
                         ::testing::Values(Layout::kToken, Layout::kExpert, Layout::kPadded),
                         [](const auto& info) {
                           return std::string(info.param == Layout::kToken    ? "token"
                                              : info.param == Layout::kExpert ? "expert"
                                                                              : "padded");
                         });

// Ranks that run ahead or fall behind: memory is used again at once, and nothing may mix up calls.
TEST(Buffer, CallsOfFastAndSlowRanksStayApart) {
  const Case c{3, 6, 2, 4, 6};
  run_threads(c.ranks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer buffer(bootstrap,
                  testing::options_for(c.experts, c.hidden, c.topk, c.max_tokens, kTimeout));
    const ExpertMap map(c.experts, c.ranks, {});
    std::mt19937 random(static_cast<unsigned>(rank));
    for (unsigned round = 0; round < 60; ++round) {
      const auto all = make_round(c, 1000 + round);
      const Batch& mine = all[static_cast<size_t>(rank)];
      Received recv;
      if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      testing::route(buffer, mine, Layout::kToken, 1, recv);
      testing::dispatch(buffer, mine, recv);
      check_token_layout(all, map, rank, recv);
      check_combined(mine, map, Layout::kExpert, false, [&] {
        // Experts of this rank add up per row, as a model's would that works on token rows.
        for (int64_t i = 0; i < recv.num_rows; ++i) {
          std::set<int> here(recv.topk_idx.begin() + i * c.topk,
                             recv.topk_idx.begin() + (i + 1) * c.topk);
          float factor = 0;
          for (int e = 0; e < c.experts; ++e)
            if (map.rank(e) == rank && here.count(map.local(e)))
              factor += static_cast<float>(e + 1);
          for (int h = 0; h < c.hidden; ++h) recv.row(i, c.hidden)[h] *= factor;
        }
        return testing::combine(buffer, mine, recv);
      }());
    }
  });
}

TEST(Buffer, SeveralBuffersAndATableOfOwners) {
  const Case c{3, 7, 2, 4, 5};
  const std::vector<int32_t> table = {2, 0, 2, 1, 2, 0, 2};
  run_threads(c.ranks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    auto options = testing::options_for(c.experts, c.hidden, c.topk, c.max_tokens, kTimeout);
    Buffer first(bootstrap, options);
    options.expert_to_rank = table;
    Buffer second(bootstrap, options);
    EXPECT_NE(first.id(), second.id());
    EXPECT_EQ(second.local_experts(), rank == 0 ? 2 : rank == 1 ? 1 : 4);
    EXPECT_EQ(second.max_local_experts(), 4);
    const auto one = make_round(c, 1), two = make_round(c, 2);
    const Batch &mine_one = one[static_cast<size_t>(rank)],
                &mine_two = two[static_cast<size_t>(rank)];
    Received recv_one, recv_two;
    testing::route(first, mine_one, Layout::kToken, 1, recv_one);
    testing::route(second, mine_two, Layout::kExpert, 4, recv_two);
    testing::dispatch(second, mine_two, recv_two);
    testing::dispatch(first, mine_one, recv_one);
    check_token_layout(one, ExpertMap(c.experts, c.ranks, {}), rank, recv_one);
    check_expert_layout(two, ExpertMap(c.experts, c.ranks, table), rank, 4, 0, recv_two);
    EXPECT_THROW(second.combine(recv_one.plan, {.dtype = Dtype::kFloat32, .hidden = c.hidden}),
                 InvalidArgument);
  });
}

TEST(Buffer, APlanIsRestoredFromItsState) {
  const Case c{3, 7, 3, 4, 6};
  run_threads(c.ranks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer buffer(bootstrap,
                  testing::options_for(c.experts, c.hidden, c.topk, c.max_tokens, kTimeout));
    const ExpertMap map(c.experts, c.ranks, {});
    const auto all = make_round(c, 5);
    const Batch& mine = all[static_cast<size_t>(rank)];
    Received recv, again;
    testing::route(buffer, mine, Layout::kExpert, 2, recv);
    testing::dispatch(buffer, mine, recv);
    const std::vector<int64_t> state = recv.plan.state();
    again.send_block = recv.send_block;
    again.plan = buffer.restore(state, again.send_block.data());
    again.num_rows = recv.num_rows;
    EXPECT_EQ(again.plan.state(), state);
    EXPECT_EQ(again.plan.result.tokens_per_expert, recv.plan.result.tokens_per_expert);
    testing::dispatch(buffer, mine, again);
    check_expert_layout(all, map, rank, 2, 0, again);
    run_experts(map, rank, c.hidden, again);
    // Combined with a copy of the receive block of the first dispatch.
    const std::vector<char> meta(recv.meta.data, recv.meta.data + recv.meta.bytes);
    again.plan = buffer.restore(state, again.send_block.data())
                     .with_recv_block(const_cast<char*>(meta.data()));
    check_combined(mine, map, Layout::kExpert, false, testing::combine(buffer, mine, again));

    for (size_t i = 0; i < state.size(); ++i) {
      std::vector<int64_t> wrong(state.begin(), state.begin() + static_cast<ptrdiff_t>(i));
      EXPECT_THROW(buffer.restore(wrong, again.send_block.data()), InvalidArgument);
    }
    auto wrong = state;
    wrong.push_back(0);
    EXPECT_THROW(buffer.restore(wrong, again.send_block.data()), InvalidArgument);
    wrong = state;
    ++wrong[0];  // another Buffer's
    EXPECT_THROW(buffer.restore(wrong, again.send_block.data()), InvalidArgument);
    for (int64_t value : {int64_t{-1}, int64_t{1} << 40}) {
      for (size_t i : {size_t{3}, size_t{4}}) {  // num_tokens, topk
        wrong = state;
        wrong[i] = value;
        EXPECT_THROW(buffer.restore(wrong, again.send_block.data()), InvalidArgument);
      }
    }
  });
}

TEST(Buffer, WhatDispatchReturnedOutlivesTheBuffer) {
  const Case c{2, 4, 2, 4, 8};
  run_threads(c.ranks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    const auto all = make_round(c, 3);
    Received recv;
    {
      Buffer buffer(bootstrap,
                    testing::options_for(c.experts, c.hidden, c.topk, c.max_tokens, kTimeout));
      const size_t free = buffer.free_bytes();
      testing::route(buffer, all[static_cast<size_t>(rank)], Layout::kToken, 1, recv);
      testing::dispatch(buffer, all[static_cast<size_t>(rank)], recv);
      if (!buffer.caps().symmetric_outputs) return;  // it wrote into memory of the test
      EXPECT_LT(buffer.free_bytes(), free);
      Allocation rows = recv.rows;
      recv.rows = {};
      EXPECT_LT(buffer.free_bytes(), free) << "a copy of the pointer is still there";
      recv.rows = rows;
      buffer.destroy();
    }
    check_token_layout(all, ExpertMap(c.experts, c.ranks, {}), rank, recv);
  });
}

}  // namespace
}  // namespace epcomm
