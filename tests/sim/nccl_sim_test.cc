// What the nccl transport does differently from others.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "epcomm/buffer.h"
#include "epcomm/error.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using testing::Batch;
using testing::now_s;
using testing::Received;
using testing::run_threads;

constexpr double kTimeout = 60;
constexpr int kRanks = 3, kExperts = 7, kHidden = 4, kTopk = 3;
constexpr int kTokens = 1100;  // of the rank with the most: five tiles, so that chunks have tokens

// Values whose sums depend on their order.
Batch random_batch(int tokens, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Batch b;
  b.tokens = tokens;
  b.topk = kTopk;
  b.hidden = kHidden;
  for (int i = 0; i < tokens * kTopk; ++i) {
    b.topk_idx.push_back(static_cast<int32_t>(random() % (kExperts + 1)) - 1);
    b.weights.push_back(normal(random));
  }
  for (int i = 0; i < tokens * kHidden; ++i) b.x.push_back(normal(random));
  return b;
}

// The bits of everything that one rank gets of a sequence of calls: rows, slots, sums.
std::vector<uint32_t> bits_of_calls(Buffer& buffer, Layout layout) {
  std::vector<uint32_t> bits;
  auto keep = [&bits](const void* data, size_t bytes) {
    const size_t at = bits.size();
    bits.resize(at + bytes / sizeof(uint32_t));
    std::memcpy(bits.data() + at, data, bytes);
  };
  const int rank = buffer.rank();
  const int tokens = rank == 1 ? 300 : kTokens - 100 * rank;
  Batch batch = random_batch(tokens, static_cast<unsigned>(rank));
  Received recv;
  testing::route(buffer, batch, layout, 4, recv);
  const size_t rows = static_cast<size_t>(recv.num_rows) * kHidden * sizeof(float);
  // The second and third time the plan is replayed, with other rows and other weights.
  for (unsigned call = 0; call < 3; ++call) {
    const Batch other = random_batch(tokens, 100 * call + static_cast<unsigned>(rank));
    batch.x = other.x;
    batch.weights = other.weights;
    testing::dispatch(buffer, batch, recv);
    keep(recv.rows.data, rows);
    keep(recv.topk_idx.data(), recv.topk_idx.size() * sizeof(int32_t));
    keep(recv.weights.data(), recv.weights.size() * sizeof(float));
    const float* const given = batch.weights.data();
    for (const float* weights : {static_cast<const float*>(nullptr), given}) {
      const std::vector<float> y = testing::combine(buffer, batch, recv, weights);
      keep(y.data(), y.size() * sizeof(float));
    }
  }
  return bits;
}

std::vector<std::vector<uint32_t>> bits_of_ranks(const std::map<std::string, std::string>& given,
                                                 Layout layout) {
  std::vector<std::vector<uint32_t>> all(kRanks);
  run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    auto options = testing::options_for(kExperts, kHidden, kTopk, kTokens, kTimeout);
    options.transport_options = given;
    Buffer buffer(bootstrap, options);
    all[static_cast<size_t>(bootstrap->rank())] = bits_of_calls(buffer, layout);
  });
  return all;
}

TEST(Nccl, ChunksGiveTheSameBits) {
  for (const Layout layout : {Layout::kToken, Layout::kExpert}) {
    const auto whole = bits_of_ranks({{"algorithm", "exact"}, {"chunks", "1"}}, layout);
    for (const char* chunks : {"2", "3", "4"})
      EXPECT_TRUE(whole == bits_of_ranks({{"algorithm", "exact"}, {"chunks", chunks}}, layout))
          << chunks << " chunks";
  }
}

// Two tokens of every rank to all ranks.
Batch batch_to_all() {
  return {2,
          3,
          kHidden,
          {0, 3, 6, 0, 3, 6},
          std::vector<float>(6, 1.0f),
          std::vector<float>(2 * kHidden, 1.0f)};
}

TEST(Nccl, ALostPeerIsNamed) {
  constexpr double kShort = 0.5;
  for (const bool combines : {false, true})
    run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
      Buffer buffer(bootstrap, testing::options_for(kExperts, kHidden, 3, 8, kShort));
      Received recv;
      testing::route(buffer, batch_to_all(), Layout::kToken, 1, recv);
      if (combines) testing::dispatch(buffer, batch_to_all(), recv);
      const double start = now_s();
      if (bootstrap->rank() != 2) {
        try {
          if (combines)
            testing::combine(buffer, batch_to_all(), recv);
          else
            testing::dispatch(buffer, batch_to_all(), recv);
          ADD_FAILURE() << "returned without rank 2";
        } catch (const PeerLost& lost) {
          EXPECT_EQ(lost.rank, 2);
          EXPECT_EQ(lost.operation, combines ? Operation::kCombine : Operation::kDispatch);
        }
        EXPECT_LT(now_s() - start, kShort + 1);
        EXPECT_THROW(testing::combine(buffer, batch_to_all(), recv), PeerLost);
      }
      bootstrap->barrier();
    });
}

}  // namespace
}  // namespace epcomm
