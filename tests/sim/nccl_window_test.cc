// When the nccl transport stores into the peers' windows instead of calling NCCL: on all ranks or
// on none. tests/test_simulated.py has ranks whose environments differ.
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "epcomm/buffer.h"
#include "epcomm/error.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"
#include "tests/sim/runtime.h"

namespace epcomm {
namespace {

using testing::run_threads;

constexpr double kTimeout = 60;
constexpr int kRanks = 3;

// What may differ between ranks.
struct Environment {
  std::vector<std::string> refusals = std::vector<std::string>(kRanks);
  std::vector<std::string> hosts = std::vector<std::string>(kRanks);
};

BufferOptions options_of(const Environment& environment, int rank, int max_tokens,
                         const std::string& algorithm) {
  auto options = testing::options_for(7, 4, 3, max_tokens, kTimeout);
  options.transport_options = {{"algorithm", algorithm}};
  options.refuses_peer_memory = environment.refusals[static_cast<size_t>(rank)];
  options.host = environment.hosts[static_cast<size_t>(rank)];
  return options;
}

// What the ranks' Buffers take by themselves, which is the same on all: window or not, and why.
std::pair<bool, std::string> choice(const Environment& environment, int max_tokens = 16) {
  std::vector<std::pair<bool, std::string>> taken(kRanks);
  run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    const Buffer buffer(bootstrap, options_of(environment, rank, max_tokens, "auto"));
    taken[static_cast<size_t>(rank)] = {buffer.caps().small_batches, buffer.choice()};
  });
  for (const auto& one : taken) EXPECT_EQ(one, taken[0]);
  return taken[0];
}

// All ranks refuse the algorithm for this reason.
void expect_refused(const std::string& reason, const Environment& environment, int max_tokens) {
  run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    try {
      const Buffer buffer(bootstrap,
                          options_of(environment, bootstrap->rank(), max_tokens, "window"));
      ADD_FAILURE() << "took window, but " << reason;
    } catch (const InvalidArgument& e) {
      const std::string text = e.what();
      EXPECT_NE(text.find("'window', but"), std::string::npos) << text;
      EXPECT_NE(text.find(reason), std::string::npos) << text;
    }
  });
}

void expect_not_taken(const std::string& reason, const Environment& environment = {},
                      int max_tokens = 16) {
  const auto [taken, why] = choice(environment, max_tokens);
  EXPECT_FALSE(taken);
  EXPECT_NE(why.find("not window"), std::string::npos) << why;
  EXPECT_NE(why.find(reason), std::string::npos) << why;
  expect_refused(reason, environment, max_tokens);
}

TEST(NcclWindow, IsTakenWhereNothingForbidsIt) {
  EXPECT_TRUE(choice({}).first);
  EXPECT_NE(choice({}).second.find("algorithm window"), std::string::npos);
  EXPECT_TRUE(choice({}, 256).first);
  Environment named;
  named.hosts = {"here", "here", "here"};
  EXPECT_TRUE(choice(named).first);
}

TEST(NcclWindow, IsNotTakenForLargeBatches) { expect_not_taken("max_tokens is 257", {}, 257); }

TEST(NcclWindow, IsNotTakenWithoutPeerAccess) {
  sim::options().no_peer_access = {{2, 1}};
  expect_not_taken("rank 2 -> rank 1");
  sim::options().no_peer_access.clear();
}

TEST(NcclWindow, IsNotTakenWhereARankRefuses) {
  Environment environment;
  environment.refusals[2] = "a reason";
  expect_not_taken("a reason on rank 2", environment);
  environment.refusals = {"a reason", "another", "a reason"};
  expect_not_taken("a reason on rank 0, 2; another on rank 1", environment);
}

TEST(NcclWindow, IsNotTakenBetweenHosts) {
  Environment environment;
  environment.hosts = {"here", "here", "there"};
  expect_not_taken("ranks 0 and 2 are on different hosts", environment);
  environment.hosts = {"", "", "there"};
  expect_not_taken("ranks 0 and 2 are on different hosts", environment);
}

}  // namespace
}  // namespace epcomm
