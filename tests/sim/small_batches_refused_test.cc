// Small batches on simulated devices: what is refused, lost or left to the other path.
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/sim/small_calls.h"

namespace epcomm {
namespace {

using namespace testing;

// What ranks disagree on: every one of them says so, and the Buffer goes on.
TEST(SmallBatchesRefused, OnAllRanksAlike) {
  const Shape c{3, 6, 3, 32, 10};
  const std::vector<std::pair<std::string, void (*)(Round&)>> changes = {
      {"layout", [](Round& r) { r.layout = Layout::kPadded; }},
      {"topk_weights", [](Round& r) { r.weighted = !r.weighted; }},
      {"dtype", [](Round& r) { r.scaled = !r.scaled; }},
      {"operation", [](Round& r) { r.host_sync = true; }},
  };
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    unsigned seed = 1300;
    for (const auto& [field, change] : changes)
      for (const bool in_halves : {false, true}) {
        Round round = make_round(c, ++seed, rank);
        round.host_sync = false;
        round.layout = Layout::kExpert;
        Round odd = round;
        if (rank == 1) change(odd);
        Calls bad{small, c, odd};
        bad.in_halves = in_halves;
        const std::string text = error_of<ConfigMismatch>(small, [&] {
          bad.route();
          bad.dispatch();
        });
        EXPECT_NE(text.find(field), std::string::npos) << field << ": " << text;
        if (!odd.host_sync) {  // the plan says that nothing was sent
          const PlanView& view = bad.plan.view;
          EXPECT_EQ(*view.num_recv, 0) << field;
          for (int i = 0; i < c.ranks * c.ranks; ++i) EXPECT_EQ(view.rank_count[i], 0) << field;
          for (int i = 0; i < odd.tokens * c.ranks; ++i) EXPECT_EQ(view.slot[i], -1) << field;
          for (int i = 0; i < odd.tokens * odd.topk; ++i) EXPECT_EQ(view.row[i], -1) << field;
        }
        if (field != "operation" && field != "layout") {  // so a combine does no harm
          bad.combine(false, false);
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

// Rank 2 does not call: the others give up in time, in whatever they wait for.
TEST(SmallBatchesLost, APeerThatDoesNotCall) {
  const Shape c{3, 6, 3, 32, 10};
  constexpr double kShort = 0.5;
  for (int late = 0; late < 4; ++late)
    run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
      const int rank = bootstrap->rank();
      Buffer small(bootstrap, options_for(c, "small", kShort));
      Round round = make_round(c, 1700, rank);
      round.host_sync = false;
      Calls calls{small, c, round};
      calls.in_halves = late % 2 == 1;
      if (late >= 2) {
        calls.route();
        calls.dispatch();
        sync();
      }
      bootstrap->barrier();
      if (rank != 2) {
        const auto begin = std::chrono::steady_clock::now();
        const std::string text = error_of<PeerLost>(small, [&] {
          if (late < 2) {
            calls.route();
            calls.dispatch();
          } else {
            calls.combine(true, false);
          }
        });
        EXPECT_NE(text.find("rank 2"), std::string::npos) << text;
        EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(2));
        EXPECT_THROW(calls.combine(false, false), PeerLost);
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
