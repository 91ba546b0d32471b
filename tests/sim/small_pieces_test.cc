// Rows of small batches in pieces, where the link puts: how they are cut, for whom, and that what
// arrives is the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda_error.h"
#include "kernels/small.cuh"
#include "tests/sim/nic.h"
#include "tests/sim/small_calls.h"

namespace epcomm {
namespace {

using namespace testing;

TEST(SmallPieces, HoldEveryByteOnce) {
  for (int bytes : {16, 1008, 2047, 2048, 2064, 3088, 4096, 5412, 7392, 10508, 14336, 81936})
    for (int wanted = 0; wanted <= RowPieces::kMost + 1; ++wanted) {
      const RowPieces pieces(bytes, wanted);
      const std::string what = std::to_string(bytes) + " bytes, " + std::to_string(wanted);
      ASSERT_TRUE(pieces.count >= 1 && pieces.count <= std::max(wanted, 1)) << what;
      ASSERT_LE(pieces.count, RowPieces::kMost) << what;
      int at = 0;
      for (int i = 0; i < pieces.count; ++i) {
        EXPECT_EQ(pieces.begin(i), at) << what;
        EXPECT_EQ(at % RowPieces::kAlignment, 0) << what;
        EXPECT_GT(pieces.end(i), at) << what;
        for (int byte : {at, pieces.end(i) - 1})
          for (int j = 0; j <= pieces.count; ++j)
            EXPECT_EQ(pieces.holds(j, byte, byte + 1), j == i) << what;
        at = pieces.end(i);
      }
      EXPECT_EQ(at, bytes) << what;
    }
}

// Warps that have a row each are not given pieces: every piece has a fence of its own.
TEST(SmallPieces, KeepAllWarpsBusy) {
  EXPECT_EQ(pieces_to_put(29, 128, 3, 14336), 1);
  EXPECT_EQ(pieces_to_put(65, 128, 3, 14336), 2);
  EXPECT_EQ(pieces_to_put(29, 32, 2, 14336), 4);
  EXPECT_EQ(pieces_to_put(1, 1, 1, 14336), 4);
  EXPECT_EQ(pieces_to_put(29, 0, 3, 14336), 1);
  EXPECT_EQ(pieces_to_put(29, 32, 2, 256), 1);
}

// Every rank has a row for each of the two others, which nothing keeps from being put in as many
// pieces as there may be. Cards that are as late as others must not matter: several Buffers.
TEST(SmallPieces, GoToThoseThatAreMapped) {
  struct Case {
    bool (*mapped)(int rank, int peer);
    uint64_t pieces;  // of all six rows
    int buffers;
  };
  const auto before = sim::options().mapped;
  const Shape c{3, 6, 1, 5248, 2};
  constexpr int kRounds = 4;
  const size_t elements = static_cast<size_t>(2 * c.hidden);
  for (const Case& given :
       {Case{[](int, int) { return false; }, 6, 1},
        Case{[](int, int) { return true; }, 6 * RowPieces::kMost, 4},
        Case{[](int rank, int peer) { return rank < peer; }, 3 + 3 * RowPieces::kMost, 2}}) {
    sim::options().mapped = given.mapped;
    const uint64_t puts = sim::Nic::puts();
    for (int n = 0; n < given.buffers; ++n)
      run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
        const int rank = bootstrap->rank();
        BufferOptions options = options_for(c, "large");
        Buffer large(bootstrap, options);
        options.transport = "rdma";
        options.transport_options.clear();
        Buffer small(bootstrap, options);
        for (int i = 0; i < kRounds; ++i) {
          Round round = make_round(c, 1000, rank);
          Random random(static_cast<unsigned>((n * kRounds + i) * c.ranks + rank));
          round.topk = 1;
          round.tokens = 2;
          round.ids64 = {(rank + 1) % 3 * 2, (rank + 2) % 3 * 2};
          round.ids32.assign(round.ids64.begin(), round.ids64.end());
          round.weights = {1.0f, 2.0f};
          round.quant = Quant::kNone;
          round.scaled = round.host_sync = false;
          round.combine_dtype = Dtype::kBfloat16;
          round.num_sms = 1;
          round.salt = static_cast<unsigned>(n * kRounds + i);
          round.x = numbers(random, elements, Dtype::kBfloat16);
          round.bias = numbers(random, elements, Dtype::kBfloat16);
          Calls l{large, c, round}, s{small, c, round};
          for (Calls* calls : {&l, &s}) {
            calls->route();
            calls->dispatch();
            calls->combine(false, true);
          }
          sync();
          const std::string what = "round " + std::to_string(i) + ", rank " + std::to_string(rank);
          expect_same_dispatch(s, l, what);
          expect_same(s.y.data(), l.y.data(), s.y.size(), what + ": y");
        }
      });
    const auto calls = static_cast<uint64_t>(2 * kRounds * given.buffers);
    EXPECT_EQ(sim::Nic::puts() - puts, calls * (6 + given.pieces));  // 6 entries
  }
  sim::options().mapped = before;
}

}  // namespace
}  // namespace epcomm
