// What a Buffer does when something is wrong, with ranks as threads.
#include <gtest/gtest.h>

#include <mutex>
#include <string>
#include <vector>

#include "epcomm/buffer.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using testing::Batch;
using testing::now_s;
using testing::Received;
using testing::run_threads;

constexpr double kTimeout = 60;
constexpr double kShort = 1;  // where a rank is missing on purpose
constexpr int kExperts = 4, kHidden = 4, kTopk = 2, kMaxTokens = 8;

BufferOptions options(double timeout_s) {
  return testing::options_for(kExperts, kHidden, kTopk, kMaxTokens, timeout_s);
}

// Two tokens to all experts.
Batch batch() {
  return {2, kTopk, kHidden, {0, 1, 2, 3}, {1, 1, 1, 1}, std::vector<float>(2 * kHidden, 1.0f)};
}

// Runs call, which must throw PeerLost for rank 2 within timeout + 1 s.
template <class Call>
void expect_lost(double timeout_s, Operation operation, uint64_t epoch, Call call) {
  const double start = now_s();
  try {
    call();
    ADD_FAILURE() << "returned without rank 2";
  } catch (const PeerLost& lost) {
    EXPECT_EQ(lost.rank, 2);
    EXPECT_EQ(lost.operation, operation);
    EXPECT_EQ(lost.epoch, epoch);
  }
  EXPECT_LT(now_s() - start, timeout_s + 1);
}

TEST(BufferFaults, APeerThatNeverCallsIsLost) {
  run_threads(3, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer buffer(bootstrap, options(kShort));
    Received recv;
    testing::route(buffer, batch(), Layout::kToken, 1, recv);
    if (bootstrap->rank() != 2) {
      expect_lost(kShort, Operation::kDispatch, 2,
                  [&] { testing::dispatch(buffer, batch(), recv); });
      // The Buffer stays lost, and says so at once.
      const double start = now_s();
      EXPECT_THROW(testing::dispatch(buffer, batch(), recv), PeerLost);
      EXPECT_LT(now_s() - start, kShort);
    }
    bootstrap->barrier();
    if (bootstrap->rank() == 2) {
      // Where rows are sent without asking, all that the others sent before they gave up is there:
      // the call may end, if the watchdog does not look meanwhile.
      const bool has_all = buffer.caps().small_batches;
      try {
        testing::dispatch(buffer, batch(), recv);
        if (has_all) testing::combine(buffer, batch(), recv);
        ADD_FAILURE() << "a rank that its peers gave up took part";
      } catch (const Evicted& evicted) {
        EXPECT_LT(evicted.by_rank, 2);
        const bool has_ended = has_all && evicted.operation == Operation::kCombine;
        EXPECT_EQ(evicted.operation, has_ended ? Operation::kCombine : Operation::kDispatch);
        EXPECT_EQ(evicted.epoch, has_ended ? 3u : 2u);
      }
    }
    bootstrap->barrier();
  });
}

TEST(BufferFaults, APeerThatDoesNotCombineIsLost) {
  run_threads(3, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer buffer(bootstrap, options(kShort));
    Received recv;
    testing::route(buffer, batch(), Layout::kExpert, 1, recv);
    testing::dispatch(buffer, batch(), recv);
    if (bootstrap->rank() != 2)
      expect_lost(kShort, Operation::kCombine, 3, [&] { testing::combine(buffer, batch(), recv); });
    bootstrap->barrier();
  });
}

TEST(BufferFaults, RanksThatDisagreeAllSayTheSame) {
  const std::vector<std::pair<const char*, void (*)(BufferOptions&)>> changes = {
      {"num_experts", [](BufferOptions& o) { o.config.num_experts = 5; }},
      {"hidden", [](BufferOptions& o) { o.config.hidden = 8; }},
      {"topk", [](BufferOptions& o) { o.config.topk = 3; }},
      {"max_tokens", [](BufferOptions& o) { o.config.max_tokens = 9; }},
      {"dtype",
       [](BufferOptions& o) { o.config = {kExperts, 8, kTopk, kMaxTokens, Dtype::kBfloat16}; }},
      {"expert_to_rank", [](BufferOptions& o) { o.expert_to_rank = {1, 1, 0, 0}; }},
  };
  for (const auto& [field, change] : changes) {
    std::mutex mutex;
    std::vector<std::string> texts;
    run_threads(3, kTimeout,
                [&, field = field, change = change](std::shared_ptr<Bootstrap> bootstrap) {
                  auto mine = options(kTimeout);
                  if (std::string(field) == "dtype") mine.config.hidden = 8;
                  if (bootstrap->rank() == 1) change(mine);
                  try {
                    Buffer buffer(bootstrap, mine);
                    ADD_FAILURE() << "ranks with another " << field << " made a Buffer";
                  } catch (const ConfigMismatch& mismatch) {
                    EXPECT_EQ(mismatch.field, field);
                    EXPECT_EQ(mismatch.value_per_rank.size(), 3u);
                    std::lock_guard lock(mutex);
                    texts.push_back(mismatch.what());
                  }
                });
    EXPECT_EQ(texts, std::vector<std::string>(3, texts.at(0))) << field;
  }
}

TEST(BufferFaults, RanksThatCallDifferentlyAllSayTheSameAndGoOn) {
  run_threads(2, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer buffer(bootstrap, options(kTimeout));
    Received recv;
    try {
      testing::route(buffer, batch(), bootstrap->rank() == 0 ? Layout::kToken : Layout::kExpert, 1,
                     recv);
      ADD_FAILURE() << "two layouts in one call";
    } catch (const ConfigMismatch& mismatch) {
      EXPECT_EQ(mismatch.field, "layout");
      EXPECT_EQ(mismatch.value_per_rank, (std::vector<std::string>{"token", "expert"}));
    }
    testing::route(buffer, batch(), Layout::kToken, 1, recv);
    testing::dispatch(buffer, batch(), recv);
    EXPECT_EQ(recv.num_rows, 2);
  });
}

TEST(BufferFaults, ABadExpertIsNamedBeforeAnyPeerWaits) {
  run_threads(2, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer buffer(bootstrap, options(kTimeout));
    Received recv;
    Batch bad = batch();
    for (int32_t id : {kExperts, -2}) {
      bad.topk_idx[3] = id;
      if (bootstrap->rank() == 0) continue;
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
    testing::route(buffer, batch(), Layout::kToken, 1,
                   recv);  // nothing was sent: the next call is in step
    testing::dispatch(buffer, batch(), recv);
  });
}

TEST(BufferFaults, TooManyTokensAreRefused) {
  run_threads(1, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer buffer(bootstrap, options(kTimeout));
    Batch large{
        kMaxTokens + 1, kTopk, kHidden, std::vector<int32_t>((kMaxTokens + 1) * kTopk, 0), {}, {}};
    Received recv;
    EXPECT_THROW(testing::route(buffer, large, Layout::kToken, 1, recv), InvalidArgument);
  });
}

TEST(BufferFaults, AFullWindowIsReportedByAllRanks) {
  run_threads(2, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    auto small = options(kTimeout);
    small.window_bytes = 16384;
    Buffer buffer(bootstrap, small);
    Received recv;
    testing::route(buffer, batch(), Layout::kToken, 1, recv);
    testing::dispatch(buffer, batch(), recv);
    {
      // Rank 1 uses up its window; combine needs some of it.
      Allocation hog;
      if (bootstrap->rank() == 1) hog = buffer.allocate(buffer.free_bytes());
      try {
        testing::combine(buffer, batch(), recv);
        ADD_FAILURE() << "no room, but combine returned";
      } catch (const WindowFull& full) {
        EXPECT_EQ(full.rank, 1);
        EXPECT_GT(full.needed_bytes, full.free_bytes);
      }
    }
    testing::combine(buffer, batch(), recv);  // there is room again
  });
}

TEST(BufferFaults, ADestroyedBufferSaysSo) {
  run_threads(1, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer buffer(bootstrap, options(kTimeout));
    buffer.destroy();
    buffer.destroy();
    Received recv;
    EXPECT_THROW(testing::route(buffer, batch(), Layout::kToken, 1, recv), BufferUnusable);
    EXPECT_THROW(buffer.allocate(1), BufferUnusable);
  });
}

}  // namespace
}  // namespace epcomm
