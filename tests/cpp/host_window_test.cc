#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <filesystem>

#include "epcomm/error.h"
#include "epcomm/window.h"
#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using testing::ForkedBootstrap;
using testing::now_s;
using testing::run_processes;
using testing::run_threads;

constexpr size_t kBytes = 64 * 1024;
constexpr double kTimeout = 20;

// Every rank writes its mark into every window, and finds all marks in its own.
bool exchange_marks(Bootstrap& bootstrap) {
  auto window = make_host_window(bootstrap, kBytes, kTimeout);
  const int rank = bootstrap.rank(), size = bootstrap.size();
  const char* mine = window->peer(rank);
  bool good =
      window->bytes() == kBytes && std::all_of(mine, mine + kBytes, [](char c) { return c == 0; });
  bootstrap.barrier();
  for (int r = 0; r < size; ++r) {
    good = good && window->alive(r);
    std::fill_n(window->peer(r) + rank * 1024, 1024, static_cast<char>(1 + rank));
  }
  bootstrap.barrier();
  for (int r = 0; r < size; ++r)
    good = good &&
           std::all_of(mine + r * 1024, mine + (r + 1) * 1024, [r](char c) { return c == 1 + r; });
  bootstrap.barrier();
  return good;
}

TEST(HostWindow, ThreadsSeeEachOthersWrites) {
  for (int size : {1, 2, 4})
    run_threads(size, kTimeout,
                [](std::shared_ptr<Bootstrap> b) { EXPECT_TRUE(exchange_marks(*b)); });
}

TEST(HostWindow, ProcessesSeeEachOthersWrites) {
  for (int size : {1, 2, 7})
    EXPECT_EQ(run_processes(size, kTimeout, exchange_marks),
              std::vector<int>(static_cast<size_t>(size), 0));
}

TEST(HostWindow, ThreadsMemoryOutlivesThePeer) {
  run_threads(2, kTimeout, [](std::shared_ptr<Bootstrap> b) {
    auto window = make_host_window(*b, kBytes, kTimeout);
    if (b->rank() == 0) window.reset();
    b->barrier();
    if (b->rank() == 1) window->peer(0)[0] = 1;
  });
}

// A killed process is noticed at once, without any signal from it, and leaves nothing behind.
TEST(HostWindow, NoticesAKilledProcess) {
  auto names = [] {
    size_t count = 0;
    for (const char* folder : {"/dev/shm", "/tmp"})
      for (const auto& entry : std::filesystem::directory_iterator(folder))
        count += entry.path().filename().string().find("epcomm") != std::string::npos;
    return count;
  };
  const size_t before = names();
  const auto status = run_processes(3, kTimeout, [](ForkedBootstrap& b) {
    auto window = make_host_window(b, kBytes, kTimeout);
    if (b.rank() == 2) ::kill(::getpid(), SIGKILL);
    const double end = now_s() + 5;
    while (window->alive(2) && now_s() < end) ::usleep(1000);
    return !window->alive(2) && window->peer(2)[0] == 0;  // its memory stays
  });
  EXPECT_EQ(status[0], 0);
  EXPECT_EQ(status[1], 0);
  EXPECT_EQ(WTERMSIG(status[2]), SIGKILL);
  EXPECT_EQ(names(), before);
}

// Rank 1 takes part in the exchange of addresses and then never connects.
TEST(HostWindow, GivesUpOnARankThatDoesNotConnect) {
  const auto status = run_processes(2, kTimeout, [](ForkedBootstrap& b) {
    if (b.rank() == 1) {
      char in[32] = {}, out[64];
      b.all_gather(in, out, sizeof in);
      return true;
    }
    const double start = now_s();
    try {
      make_host_window(b, kBytes, 0.3);
    } catch (const PeerLost& lost) {
      return lost.operation == Operation::kInit && now_s() - start < 5.0;  // a busy machine
    }
    return false;
  });
  EXPECT_EQ(status, std::vector<int>({0, 0}));
}

}  // namespace
}  // namespace epcomm
