// What the nvlink transport does differently from transports on the host.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "epcomm/buffer.h"
#include "epcomm/error.h"
#include "kernels/token_layout.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"
#include "tests/sim/small_calls.h"

namespace epcomm {
namespace {

using testing::Batch;
using testing::Received;
using testing::run_threads;

constexpr double kTimeout = 60;
constexpr int kExperts = 4, kHidden = 4, kTopk = 2, kMaxTokens = 8;

BufferOptions options() {
  return testing::options_for(kExperts, kHidden, kTopk, kMaxTokens, kTimeout);
}
Batch batch() {
  return {2, kTopk, kHidden, {0, 1, 2, 3}, {1, 1, 1, 1}, std::vector<float>(2 * kHidden, 1.0f)};
}

TEST(Nvlink, ABadExpertIsNamedOnAllRanks) {
  run_threads(3, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer buffer(bootstrap, options());
    Received recv;
    for (int32_t id : {kExperts, -2}) {
      Batch bad = batch();
      if (bootstrap->rank() == 1) bad.topk_idx[3] = id;
      try {
        testing::route(buffer, bad, Layout::kToken, 1, recv);
        ADD_FAILURE() << "expert " << id << " was taken";
      } catch (const InvalidArgument& e) {
        const std::string text = e.what();
        for (const std::string& part : {std::string("rank 1"), std::string("token 1"),
                                        std::string("slot 1"), "is " + std::to_string(id)})
          EXPECT_NE(text.find(part), std::string::npos) << text;
      }
    }
    testing::route(buffer, batch(), Layout::kToken, 1, recv);  // all ranks are in step
    testing::dispatch(buffer, batch(), recv);
    for (int i = 0; i < recv.num_rows * kHidden; ++i) EXPECT_EQ(recv.row(0, kHidden)[i], 1.0f);
  });
}

// What a rank with a full window does: it says so in the call, which all ranks refuse.
TEST(Nvlink, ADispatchWithoutRoomIsRefusedByAllRanks) {
  run_threads(3, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer buffer(bootstrap, options());
    Received recv;
    for (int round = 0; round < 3; ++round) {
      testing::route(buffer, batch(), Layout::kToken, 1, recv);
      testing::dispatch(buffer, batch(), recv);
      const std::vector<float> before(recv.row(0, kHidden), recv.row(recv.num_rows, kHidden));
      DispatchArgs args;
      const Batch mine = batch();
      args.x = mine.x.data();
      args.topk_weights = mine.weights.data();
      args.dtype = Dtype::kFloat32;
      args.row_bytes = kHidden * static_cast<int>(sizeof(float));
      args.recv_capacity = recv.plan.result.num_recv_tokens;
      args.row_capacity = recv.num_rows;
      args.recv_x = recv.rows.data;
      if (bootstrap->rank() == 1) {
        args.needed_bytes = 1000;
        args.free_bytes = 10;
      }
      try {
        testing::finish(buffer, [&] { buffer.dispatch(recv.plan, args); });
        ADD_FAILURE() << "no room, but dispatch returned";
      } catch (const WindowFull& full) {
        EXPECT_EQ(full.rank, 1);
        EXPECT_EQ(full.needed_bytes, 1000u);
        EXPECT_EQ(full.free_bytes, 10u);
      }
      EXPECT_TRUE(std::equal(before.begin(), before.end(), recv.row(0, kHidden)))
          << "a refused dispatch moved rows";
    }
    testing::dispatch(buffer, batch(), recv);
  });
}

// Combines that the host has launched before it could learn that the dispatch was refused: what
// the memory of the plan's records held before must not become addresses.
TEST(Nvlink, ACombineBehindARefusedDispatchReadsNoRecords) {
  const testing::Shape c{3, 6, 3, 32, 10};
  testing::run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer buffer(bootstrap, testing::options_for(c, "large"));
    for (unsigned seed = 0; seed < 6; ++seed) {
      testing::Round round = testing::make_round(c, 1600 + seed, rank);
      round.host_sync = round.ahead = false;
      round.weighted = true;
      round.layout = seed % 3 == 0 ? Layout::kExpert : Layout::kPadded;
      testing::Calls calls{buffer, c, round};
      // A host learns of the refusal at the earliest when the late rank has come.
      const bool late = rank == static_cast<int>(seed) % c.ranks;
      std::string found;
      auto call = [&](auto body) {
        if (late) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        try {
          body();
        } catch (const ConfigMismatch& e) {
          found = e.what();  // which is reported once
          body();
        }
      };
      calls.route();
      // Rows that do not exist of tokens that do, and the other way round.
      const MetaLayout meta(round.topk);
      std::memset(calls.meta.data, 0x31, calls.meta.bytes);
      for (int64_t n = 0; n < calls.capacity; ++n) {
        if (seed % 2 == 0)
          *meta.token(calls.meta.data, n) = 0;
        else
          std::memset(meta.row(calls.meta.data, n), 0, sizeof(int32_t));
      }
      if (late) calls.round.weighted = false;
      call([&] { calls.dispatch(); });
      call([&] { calls.combine(seed < 4, false); });
      found += testing::error_of<ConfigMismatch>(buffer, [] {});
      EXPECT_NE(found.find("topk_weights"), std::string::npos) << found;
    }
    testing::Round round = testing::make_round(c, 1700, rank);
    testing::Calls calls{buffer, c, round};
    calls.route();
    calls.dispatch();
    calls.combine(true, true);
    EXPECT_EQ(testing::error_of<Error>(buffer, [] {}), "");
  });
}

}  // namespace
}  // namespace epcomm
