// Small batches on simulated devices: what is refused, lost or left to the other path.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/sim/small_calls.h"

namespace epcomm {
namespace {

using namespace testing;

// What ranks disagree on: every one of them says so, and the Buffer goes on. In halves a host that
// waits for the counts routes first, which is another operation.
TEST(SmallBatchesRefused, OnAllRanksAlike) {
  const Shape c{3, 6, 3, 32, 10};
  const std::vector<std::pair<std::string, void (*)(Round&)>> changes = {
      {"layout", [](Round& r) { r.layout = Layout::kPadded; }},
      {"topk_weights", [](Round& r) { r.weighted = !r.weighted; }},
      {"dtype", [](Round& r) { r.scaled = !r.scaled; }},
      {"host_sync", [](Round& r) { r.host_sync = r.ahead = !r.host_sync; }},
  };
  enum class Mode { kWhole, kHalves, kAhead };
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    unsigned seed = 1300;
    for (const auto& [field, change] : changes)
      for (const Mode mode : {Mode::kWhole, Mode::kHalves, Mode::kAhead}) {
        Round round = make_round(c, ++seed, rank);
        round.host_sync = round.ahead = mode == Mode::kAhead;
        round.layout = Layout::kExpert;
        Round odd = round;
        if (rank == 1) change(odd);
        Calls bad{small, c, odd};
        bad.in_halves = mode == Mode::kHalves;
        const std::string text = error_of<ConfigMismatch>(small, [&] {
          bad.route();
          bad.dispatch();
        });
        const bool routed = field == "host_sync" && bad.in_halves;
        const std::string found = routed ? "operation" : field;
        EXPECT_NE(text.find(found), std::string::npos) << field << ": " << text;
        sync();
        const PlanView& view = bad.plan.view;
        if (view.num_recv != nullptr) {  // the plan says that nothing was sent
          EXPECT_EQ(*view.num_recv, 0) << field;
          for (int i = 0; i < c.ranks * c.ranks; ++i) EXPECT_EQ(view.rank_count[i], 0) << field;
          for (int i = 0; i < odd.tokens * c.ranks; ++i) EXPECT_EQ(view.slot[i], -1) << field;
          for (int i = 0; i < odd.tokens * odd.topk; ++i) EXPECT_EQ(view.row[i], -1) << field;
        }
        if (mode != Mode::kAhead && field != "host_sync" && field != "layout") {
          bad.combine(false, false);  // does no harm
          sync();
        }
        Calls l{large, c, round}, s{small, c, round};
        for (Calls* calls : {&l, &s}) {
          calls->route();
          calls->dispatch();
        }
        sync();
        expect_same_dispatch(s, l, "after a mismatch of " + field);
      }
  });
}

// dtype of x, or how it crosses, differs between ranks: refused by all, whichever half finds it.
TEST(SmallBatchesRefused, CombinesToo) {
  const Shape c{2, 6, 3, 128, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer small(bootstrap, options_for(c, "small"));
    for (unsigned seed = 0; seed < 16; ++seed) {
      Round round = make_round(c, 1400 + seed, rank);
      const bool by_quant = seed >= 8;
      if (by_quant)
        round.combine_quant = rank == 0 ? Quant::kFp8 : Quant::kNone;
      else
        round.combine_dtype = rank == 0 ? Dtype::kBfloat16 : Dtype::kFloat32;
      Calls calls{small, c, round};
      calls.in_halves = seed % 2 == 0;
      calls.route();
      calls.dispatch();
      // The send half of a weighted combine finds it out, but it is told when the call is over.
      calls.between = [&] {
        sync();
        EXPECT_NO_THROW(small.check_faults());
      };
      const std::string text =
          error_of<ConfigMismatch>(small, [&] { calls.combine(seed % 4 < 2, false); });
      EXPECT_NE(text.find(by_quant ? "quant" : "dtype"), std::string::npos) << text;
      EXPECT_EQ(error_of<Error>(small, [] {}), "") << "reported twice";
    }
  });
}

TEST(SmallBatchesRefused, HalvesThatDoNotFit) {
  const Shape c{1, 6, 3, 32, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer small(bootstrap, options_for(c, "small")), large(bootstrap, options_for(c, "large"));
    Round round = make_round(c, 1500, 0);
    round.host_sync = false;
    Calls calls{small, c, round};
    calls.route();
    calls.dispatch();
    CombineArgs args;
    args.dtype = Dtype::kFloat32;
    args.hidden = c.hidden;
    calls.combine(false, false);
    args.x = calls.combine_x.data();
    calls.round.combine_dtype = Dtype::kFloat32;
    std::vector<uint8_t> x(static_cast<size_t>(calls.rows) * 4 * static_cast<size_t>(c.hidden));
    std::vector<float> y(calls.round.bias.size());
    args.x = x.data();
    args.out = y.data();
    args.phase = Phase::kReceive;
    EXPECT_THROW(small.combine(calls.plan, args), InvalidArgument);
    args.phase = Phase::kSend;
    small.combine(calls.plan, args);
    EXPECT_THROW(small.combine(calls.plan, args), InvalidArgument);
    EXPECT_THROW(calls.route(), InvalidArgument);
    args.phase = Phase::kReceive;
    small.combine(calls.plan, args);
    sync();

    Calls whole{large, c, round};
    whole.route();
    whole.dispatch();
    args.phase = Phase::kSend;
    EXPECT_THROW(large.combine(whole.plan, args), InvalidArgument);
    sync();
  });
}

TEST(SmallBatchesRefused, AheadOfTheirCountsWithoutRoom) {
  const Shape c{1, 6, 3, 32, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer small(bootstrap, options_for(c, "small"));
    for (const Layout layout : {Layout::kToken, Layout::kExpert, Layout::kPadded}) {
      Round round = make_round(c, 1550, 0);
      round.host_sync = round.ahead = true;
      round.layout = layout;
      round.alignment = 1;
      Calls calls{small, c, round};
      for (int64_t* less : {&calls.capacity, &calls.rows}) {
        calls.route();
        --*less;
        EXPECT_THROW(calls.dispatch(), InvalidArgument);
      }
      calls.route();
      calls.in_halves = true;
      EXPECT_THROW(calls.dispatch(), InvalidArgument);
      calls.in_halves = false;
      calls.route();
      calls.dispatch();
      sync();
    }
  });
}

// The host cannot wait for a kernel that a graph will launch.
TEST(SmallBatchesRefused, HostsThatWaitInACapture) {
  const Shape c{1, 6, 3, 32, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer small(bootstrap, options_for(c, "small"));
    cudaStream_t stream;
    EPCOMM_CUDA_TRY(cudaStreamCreate(&stream));
    Round round = make_round(c, 1560, 0);
    round.host_sync = true;
    for (const bool ahead : {false, true}) {
      round.ahead = ahead;
      Calls calls{small, c, round, stream};
      cudaGraph_t graph;
      EPCOMM_CUDA_TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      EXPECT_THROW(calls.route(), InvalidArgument);
      EPCOMM_CUDA_TRY(cudaStreamEndCapture(stream, &graph));
      cudaGraphDestroy(graph);
      calls.route();
      calls.dispatch();
      sync();
    }
    EPCOMM_CUDA_TRY(cudaStreamDestroy(stream));
  });
}

// Where the host waits for the counts, all ranks say which rank has which bad id, and none receives
// anything; the first of the lowest rank that has any.
TEST(SmallBatchesRefused, BadExpertIdsWhereTheHostWaits) {
  const Shape c{3, 6, 3, 4096, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    for (unsigned seed = 0; seed < 8; ++seed) {
      Round round = make_round(c, 1650 + seed, rank);
      round.host_sync = true;
      round.ahead = seed % 4 != 3;
      round.topk = 2;
      round.tokens = 4;
      round.ids32.assign(8, 2);
      round.ids64.assign(8, 2);
      round.weights.assign(8, 1.0f);
      round.x.assign(8 * static_cast<size_t>(c.hidden) * 4, 1);
      round.scales.assign(4 * kScaleBytes, 1);
      Round bad = round;
      bad.x.assign(bad.x.size(), 3);  // what was staged for a refused call must not be taken later
      bad.scales.assign(bad.scales.size(), 3);
      const int64_t id = seed % 2 == 0 ? -2 : seed < 4 ? c.experts : int64_t{1} << 40;
      if (rank >= 1)
        for (size_t i : {size_t{5}, size_t{7}}) {
          bad.wide_ids = true;
          bad.ids64[i] = id;
        }
      else
        bad.wide_ids = true;
      Calls calls{small, c, bad};
      const std::string text = error_of<InvalidArgument>(small, [&] {
        calls.route();
        calls.dispatch();
      });
      const int64_t told = std::min<int64_t>(id, INT32_MAX);
      EXPECT_NE(text.find("topk_idx[2, 1] on rank 1 (token 2, slot 1) is " + std::to_string(told) +
                          "; expected an expert in [0, 6)"),
                std::string::npos)
          << text;
      sync();
      for (size_t i = 0; i < calls.x.bytes; ++i)
        if (static_cast<uint8_t>(calls.x.data[i]) != 0xa5) {
          ADD_FAILURE() << "something was received";
          break;
        }
      EXPECT_EQ(error_of<Error>(small, [] {}), "") << "reported twice";
      for (int call = 1; call < 4; ++call) {  // staging alternates
        Calls l{large, c, round}, s{small, c, round};
        for (Calls* one : {&l, &s}) {
          one->route();
          one->dispatch();
        }
        sync();
        expect_same_dispatch(s, l, std::to_string(call) + " calls after a bad id");
      }
    }
  });
}

TEST(SmallBatchesRefused, BadExpertIdsCountAsNone) {
  const Shape c{2, 6, 3, 32, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    Round round = make_round(c, 1600, rank);
    round.host_sync = false;
    for (unsigned seed = 1601; round.tokens < 2 || round.topk < 2; ++seed) {
      round = make_round(c, 1600, rank);  // the same choices on all ranks
      Random random(seed);
      round.tokens = 4;
      round.ids32.assign(static_cast<size_t>(4 * round.topk), 2);
      round.ids64.assign(static_cast<size_t>(4 * round.topk), 2);
      round.weights.assign(static_cast<size_t>(4 * round.topk), 1.0f);
      round.x = numbers(random, 4 * static_cast<size_t>(c.hidden), Dtype::kBfloat16);
      round.scales = numbers(random, 4 * kScaleBytes / 4, Dtype::kFloat32);
      round.bias = numbers(random, 4 * static_cast<size_t>(c.hidden), round.combine_dtype);
      round.host_sync = false;
      break;
    }
    Round none = round, bad = round;
    const size_t last = round.ids32.size() - 1;
    for (int64_t id : {int64_t{c.experts}, int64_t{-2}}) {
      none.ids32[last] = -1;
      none.ids64[last] = -1;
      bad.ids32[last] = static_cast<int32_t>(id);
      bad.ids64[last] = id;
      Calls l{large, c, none}, s{small, c, bad};
      for (Calls* calls : {&l, &s}) {
        calls->route();
        calls->dispatch();
      }
      sync();
      expect_same_dispatch(s, l, "id " + std::to_string(id));
      const std::string text = error_of<InvalidArgument>(small, [&] { s.route(); });
      EXPECT_NE(text.find("is " + std::to_string(id)), std::string::npos) << text;
      EXPECT_NE(text.find("rank " + std::to_string(rank)), std::string::npos) << text;
    }
  });
}

// A rank that makes another call, which knows nothing of staging, finds rows of the refused one
// there when the parity of the epoch comes round.
TEST(SmallBatchesRefused, RowsOfARefusedCallAreNotTakenLater) {
  const Shape c{3, 6, 3, 4096, 64};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    for (unsigned seed = 0; seed < 6; ++seed) {
      auto good = [&](unsigned salt) {
        Round round = make_round(c, 3300 + 10 * seed + salt, rank);
        round.host_sync = round.ahead = false;
        round.delay_us = 0;
        if (salt == 4) round.num_sms = rank == 1 ? 0 : 1;
        Calls l{large, c, round}, s{small, c, round};
        for (Calls* calls : {&l, &s}) {
          calls->route();
          calls->dispatch();
        }
        sync();
        expect_same_dispatch(s, l,
                             "seed " + std::to_string(seed) + " call " + std::to_string(salt));
      };
      good(0);
      good(1);
      Round odd = make_round(c, 3300 + 10 * seed + 2, rank);
      odd.host_sync = odd.ahead = false;
      if (rank == 1) odd.host_sync = true;
      Calls bad{small, c, odd};
      const std::string text = error_of<ConfigMismatch>(small, [&] {
        bad.route();
        bad.dispatch();
      });
      EXPECT_NE(text.find("operation"), std::string::npos) << text;
      sync();
      good(3);
      good(4);
    }
  });
}

// Rank 2 does not call: the others give up in time, in whatever they wait for.
TEST(SmallBatchesLost, APeerThatDoesNotCall) {
  const Shape c{3, 6, 3, 32, 10};
  constexpr double kShort = 0.5;
  for (int late = 0; late < 5; ++late)
    run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
      const int rank = bootstrap->rank();
      Buffer small(bootstrap, options_for(c, "small", kShort));
      Round round = make_round(c, 1700, rank);
      round.host_sync = round.ahead = late == 4;
      Calls calls{small, c, round};
      calls.in_halves = late % 2 == 1;
      if (late == 2 || late == 3) {
        calls.route();
        calls.dispatch();
        sync();
      }
      bootstrap->barrier();
      if (rank != 2) {
        const auto begin = std::chrono::steady_clock::now();
        const std::string text = error_of<PeerLost>(small, [&] {
          if (late < 2 || late == 4) {
            calls.route();
            calls.dispatch();
          } else {
            calls.combine(true, false);
          }
        });
        EXPECT_NE(text.find("rank 2"), std::string::npos) << text;
        EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(2));
        if (late < 4) {
          EXPECT_THROW(calls.combine(false, false), PeerLost);
        }
        sync();
        EXPECT_THROW(calls.route(), PeerLost);
      }
      bootstrap->barrier();
    });
}

TEST(SmallBatchesPath, IsChosenBySize) {
  const Shape c{2, 6, 3, 32, 256};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    auto small_batches = [&](const Shape& shape, const char* path) {
      return Buffer(bootstrap, options_for(shape, path)).caps().small_batches;
    };
    EXPECT_TRUE(small_batches(c, "auto"));
    EXPECT_TRUE(small_batches(c, "small"));
    EXPECT_FALSE(small_batches(c, "large"));
    Shape wide = c;
    wide.max_tokens = 257;
    EXPECT_FALSE(small_batches(wide, "auto"));
    EXPECT_THROW(small_batches(wide, "small"), InvalidArgument);
    Shape many = c;
    many.experts = 2000;
    EXPECT_FALSE(small_batches(many, "auto"));
    EXPECT_THROW(small_batches(many, "small"), InvalidArgument);
    EXPECT_THROW(small_batches(c, "middle"), InvalidArgument);
    BufferOptions unknown = options_for(c, "auto");
    unknown.transport_options["road"] = "small";
    EXPECT_THROW(Buffer(bootstrap, unknown), InvalidArgument);
  });
}

}  // namespace
}  // namespace epcomm
