// Small batches on simulated devices: every output and plan array must be what the path for large
// batches gives, bit for bit, however ranks and calls overlap. (That path is held against an
// oracle by buffer_test.cc, and so are the kernels for small batches where the host waits.)
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "core/quant_rows.h"
#include "tests/sim/small_calls.h"

namespace epcomm {
namespace {

using namespace testing;

class SmallBatches : public ::testing::TestWithParam<Shape> {};

// Each round: the same calls on a large-batch Buffer, then on one of two small-batch Buffers,
// whole or in halves; then a replay of each.
TEST_P(SmallBatches, GiveWhatTheLargePathGives) {
  const Shape c = GetParam();
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), one(bootstrap, options_for(c, "small")),
        two(bootstrap, options_for(c, "auto"));
    ASSERT_TRUE(one.caps().small_batches && two.caps().small_batches);
    ASSERT_FALSE(large.caps().small_batches);
    const int rounds = c.max_tokens > 100 ? 3 : 14;
    for (unsigned seed = 1; seed <= static_cast<unsigned>(rounds); ++seed) {
      const Round round = make_round(c, seed + static_cast<unsigned>(c.ranks) * 100, rank);
      const std::string what = "round " + std::to_string(seed) + ", rank " + std::to_string(rank);
      Calls l{large, c, round}, s{seed % 3 == 0 ? two : one, c, round};
      s.in_halves = seed % 2 == 1;
      auto compare_combines = [&](bool weighted, bool biased, const std::string& which) {
        l.combine(weighted, biased);
        s.combine(weighted, biased);
        sync();
        expect_same(s.y.data(), l.y.data(), s.y.size(), which);
      };
      l.route();
      s.route();
      l.dispatch();
      s.dispatch();
      sync();
      expect_same_dispatch(s, l, what);
      compare_combines(false, seed % 4 < 2, what + ": y");
      compare_combines(true, seed % 4 == 0, what + ": weighted y");

      // Other rows with the same plan.
      Random random(seed);
      for (Calls* calls : {&l, &s}) {
        for (uint8_t& byte : calls->round.x) byte = static_cast<uint8_t>(byte * 5 + 1);
        for (float& weight : calls->round.weights) weight += 1.0f;
        std::memset(calls->x.data, 0x5a, calls->x.bytes);
        calls->dispatch(true, seed % 2 == 0);
      }
      sync();
      expect_same_dispatch(s, l, what + ", replayed");
      compare_combines(true, false, what + ": y of the replay");
    }
  });
}

INSTANTIATE_TEST_SUITE_P(All, SmallBatches,
                         ::testing::Values(Shape{1, 3, 2, 16, 9}, Shape{2, 5, 3, 16, 21},
                                           Shape{3, 7, 4, 528, 12}, Shape{4, 10, 4, 48, 17},
                                           Shape{2, 6, 4, 32, 150}, Shape{2, 40, 8, 16, 256},
                                           Shape{2, 5, 3, 640, 15}, Shape{3, 5, 3, 5248, 4},
                                           Shape{6, 12, 8, 48, 7}),
                         [](const auto& info) {
                           return "ranks" + std::to_string(info.param.ranks) + "tokens" +
                                  std::to_string(info.param.max_tokens) + "hidden" +
                                  std::to_string(info.param.hidden);
                         });

// A dispatch on each Buffer, and combines without and with weights.
void expect_same_round_trip(Calls& small, Calls& large, const std::string& what) {
  for (Calls* calls : {&large, &small}) {
    calls->route();
    calls->dispatch();
  }
  sync();
  expect_same_dispatch(small, large, what);
  for (const bool weighted : {false, true}) {
    for (Calls* calls : {&large, &small}) calls->combine(weighted, true);
    sync();
    expect_same(small.y.data(), large.y.data(), small.y.size(), what + ": y");
  }
}

// One rank has nearly all tokens, so that a block has many rows from one source and none from
// others, and warps have several rows each, and several words of masks.
TEST(SmallBatchesUneven, GiveWhatTheLargePathGives) {
  const Shape c{3, 6, 4, 48, 200};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    for (int busy = 0; busy < c.ranks; ++busy) {
      Round round = make_round(c, 300 + static_cast<unsigned>(busy), rank);
      Random random(static_cast<unsigned>(busy * c.ranks + rank));
      round.tokens = rank == busy ? c.max_tokens : rank == (busy + 1) % c.ranks ? 1 : 0;
      round.num_sms = 1 + (rank + busy) % 2;
      const size_t tokens = static_cast<size_t>(round.tokens);
      round.ids32.resize(tokens * static_cast<size_t>(round.topk));
      for (int32_t& id : round.ids32) id = random.below(c.experts + 1) - 1;
      round.ids64.assign(round.ids32.begin(), round.ids32.end());
      round.weights.assign(round.ids32.size(), 0.0f);
      for (float& weight : round.weights) weight = random.real();
      round.quant = Quant::kNone;
      round.x = numbers(random, tokens * static_cast<size_t>(c.hidden), Dtype::kBfloat16);
      round.scales = numbers(random, tokens * kScaleBytes / 4, Dtype::kFloat32);
      round.bias = numbers(random, tokens * static_cast<size_t>(c.hidden), round.combine_dtype);
      Calls l{large, c, round}, s{small, c, round};
      expect_same_round_trip(s, l, "rank " + std::to_string(busy) + " is busy");
    }
  });
}

// As many blocks as it takes for one that only writes the plan: 11 send, of 17 others one does.
// Each of the rest knows the places of its own rank alone.
TEST(SmallBatchesOnManyBlocks, GiveWhatTheLargePathGives) {
  constexpr int kBlocks = 28;
  const Shape c{2, 6, 3, 32, 90};  // more rows than there are blocks
  const int before = sim::options().num_sms;
  sim::options().num_sms = kBlocks;
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    for (unsigned seed = 1; seed <= 6; ++seed) {
      Round round = make_round(c, 700 + seed, rank);
      round.num_sms = 2;
      Calls l{large, c, round};
      round.num_sms = kBlocks;
      Calls s{small, c, round};
      expect_same_round_trip(s, l,
                             "round " + std::to_string(seed) + ", rank " + std::to_string(rank));
    }
  });
  sim::options().num_sms = before;
}

// Every format and type of rows; a block sends more rows than it has warps, and each has more
// scales than a warp keeps at a time.
TEST(SmallBatchesQuantised, InLongRows) {
  const Shape c{1, 2, 1, 12288, 18};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    for (Quant quant : {Quant::kFp8, Quant::kFp8Ue8m0, Quant::kNvfp4})
      for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16, Dtype::kFloat32}) {
        Round round = make_round(c, 700, 0);
        Random random(7);
        round.tokens = c.max_tokens;
        round.ids32.assign(static_cast<size_t>(c.max_tokens * round.topk), 0);
        round.ids64.assign(round.ids32.size(), 0);
        round.weights.assign(round.ids32.size(), 1.0f);
        round.x = numbers(random, static_cast<size_t>(c.max_tokens * c.hidden), dtype);
        round.scaled = false;
        round.quant = quant;
        round.x_dtype = dtype;
        round.num_sms = 1;
        Calls l{large, c, round}, s{small, c, round};
        for (Calls* calls : {&l, &s}) {
          calls->route();
          calls->dispatch();
        }
        sync();
        expect_same_dispatch(s, l, "quant " + std::to_string(static_cast<int>(quant)));
      }
  });
}

// Partial rows that cross as fp8, against the functions of the host. Blocks and rows as above.
TEST(SmallBatchesQuantised, CombinesInLongRows) {
  const Shape c{1, 2, 2, 40960, 24};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer small(bootstrap, options_for(c, "small"));
    for (const bool weighted : {false, true})
      for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16, Dtype::kFloat32}) {
        Round round = make_round(c, 800, 0);
        Random random(8);
        const size_t elements = static_cast<size_t>(c.max_tokens * c.hidden),
                     bytes = static_cast<size_t>(dtype_bytes(dtype));
        round.layout = Layout::kExpert;
        round.topk = 2;
        round.tokens = c.max_tokens;
        round.ids32.resize(static_cast<size_t>(2 * c.max_tokens));
        round.ids64.resize(round.ids32.size());
        round.weights.resize(round.ids32.size());
        for (size_t i = 0; i < round.ids32.size(); ++i) {  // one row, two, or none
          round.ids64[i] = round.ids32[i] =
              static_cast<int32_t>(i / 2 % 4) - static_cast<int>(i % 2);
          if (round.ids32[i] > 1) round.ids64[i] = round.ids32[i] = -1;
          round.weights[i] = random.real();
        }
        round.scaled = false;
        round.quant = Quant::kNone;
        round.x = numbers(random, elements, Dtype::kBfloat16);
        round.bias = numbers(random, elements, dtype);
        round.combine_dtype = dtype;
        round.combine_quant = Quant::kFp8;
        round.num_sms = 1;
        Calls calls{small, c, round};
        calls.route();
        calls.dispatch();
        calls.combine(weighted, true);
        sync();
        std::vector<uint8_t> y(round.bias.size()), partial(fp8_row_bytes(c.hidden));
        for (size_t t = 0; t < static_cast<size_t>(c.max_tokens); ++t) {
          std::vector<RowTerm> terms;
          for (size_t i = 2 * t; i < 2 * t + 2; ++i)
            if (const int32_t row = calls.plan.view.row[i]; row >= 0)
              terms.push_back({reinterpret_cast<const char*>(calls.combine_x.data()) +
                                   static_cast<size_t>(row * c.hidden) * bytes,
                               weighted ? round.weights[i] : 1.0f});
          std::vector<const char*> partials;
          if (!terms.empty()) {
            sum_to_fp8_row(dtype, terms, weighted, c.hidden, partial.data());
            partials.push_back(reinterpret_cast<const char*>(partial.data()));
          }
          const size_t at = t * static_cast<size_t>(c.hidden) * bytes;
          sum_fp8_rows(dtype, partials, round.bias.data() + at, y.data() + at, c.hidden);
        }
        expect_same(calls.y.data(), y.data(), y.size(),
                    "y of dtype " + std::to_string(static_cast<int>(dtype)));
      }
  });
}

// Calls that are enqueued without a pause, so that ranks run ahead of each other: staging that was
// used again too early would mix their rows up.
TEST(SmallBatchesInARow, DoNotDisturbEachOther) {
  const Shape c{3, 6, 3, 128, 24};
  for (int repeat = 0; repeat < 3; ++repeat)
    run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
      const int rank = bootstrap->rank();
      Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
      constexpr unsigned kRounds = 10;
      std::vector<std::unique_ptr<Calls>> expected, got;
      for (unsigned seed = 0; seed < kRounds; ++seed) {
        Round round = make_round(c, 500 + seed + static_cast<unsigned>(repeat) * kRounds, rank);
        round.host_sync = false;
        expected.push_back(std::make_unique<Calls>(large, c, round));
        got.push_back(std::make_unique<Calls>(small, c, round));
        Calls& l = *expected.back();
        l.route();
        l.dispatch();
        l.combine(round.weighted, true);
        sync();
      }
      for (auto& calls : got) {
        calls->route();
        calls->dispatch();
        calls->combine(calls->round.weighted, true);
      }
      sync();
      for (size_t i = 0; i < kRounds; ++i) {
        const std::string what = "call " + std::to_string(i) + ", rank " + std::to_string(rank);
        expect_same_dispatch(*got[i], *expected[i], what);
        expect_same(got[i]->y.data(), expected[i]->y.data(), got[i]->y.size(), what + ": y");
      }
    });
}

// A captured dispatch and combine, replayed with other rows and ids, with eager calls between.
void replay_graphs(unsigned base) {
  const Shape c{3, 6, 3, 128, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    auto fixed = [&](unsigned seed) {
      Round round = make_round(c, base, rank);
      round.host_sync = false;
      Random random(seed * 5 + static_cast<unsigned>(rank));
      for (size_t i = 0; i < round.ids64.size(); ++i)
        round.ids64[i] = round.ids32[i] = random.below(c.experts + 1) - 1;
      for (uint8_t& byte : round.x) byte = static_cast<uint8_t>(random.below(256));
      for (float& weight : round.weights) weight = random.real();
      return round;
    };
    std::vector<int64_t> counted(static_cast<size_t>(small.local_experts()), 5), sums = counted;
    small.set_statistics({counted.data(), nullptr});
    auto add_up = [&](const Calls& calls) {
      for (size_t e = 0; e < sums.size(); ++e) sums[e] += calls.plan.view.tokens_per_expert[e];
    };
    cudaStream_t stream;
    EPCOMM_CUDA_TRY(cudaStreamCreate(&stream));
    Calls captured{small, c, fixed(0), stream};
    EPCOMM_CUDA_TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    captured.route();
    captured.dispatch();
    captured.combine(captured.round.weighted, false);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    EPCOMM_CUDA_TRY(cudaStreamEndCapture(stream, &graph));
    EPCOMM_CUDA_TRY(cudaGraphInstantiate(&exec, graph, 0));
    for (unsigned seed = 1; seed < 8; ++seed) {
      const Round round = fixed(seed);
      Calls l{large, c, round}, eager{small, c, round, stream};
      for (Calls* calls : {&l, &eager}) {
        calls->route();
        calls->dispatch();
        calls->combine(round.weighted, false);
      }
      sync();
      std::memcpy(captured.round.ids32.data(), round.ids32.data(), round.ids32.size() * 4);
      std::memcpy(captured.round.ids64.data(), round.ids64.data(), round.ids64.size() * 8);
      std::memcpy(captured.round.x.data(), round.x.data(), round.x.size());
      std::memcpy(captured.round.weights.data(), round.weights.data(), round.weights.size() * 4);
      std::memset(captured.x.data, 0xa5, captured.x.bytes);
      std::memset(captured.scales.data, 0xa5, captured.scales.bytes);
      std::memset(captured.meta.data, 0xa5, captured.meta.bytes);
      EPCOMM_CUDA_TRY(cudaGraphLaunch(exec, stream));
      sync();
      const std::string what = "replay " + std::to_string(seed);
      expect_same_dispatch(captured, l, what);
      expect_same(captured.y.data(), l.y.data(), l.y.size(), what + ": y");
      expect_same(eager.y.data(), l.y.data(), l.y.size(), what + ": y of an eager call");
      add_up(captured);
      add_up(eager);
      EXPECT_EQ(counted, sums) << what;
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    EPCOMM_CUDA_TRY(cudaStreamDestroy(stream));
  });
}

TEST(SmallBatchesInAGraph, AreCountedOnTheDevice) {
  for (unsigned base : {900u, 901u, 902u}) replay_graphs(base);
}

}  // namespace
}  // namespace epcomm
