// What a rank asks before it believes a call that has ended on its stream (GpuWatchdog::confirm):
// has a peer given somebody up meanwhile? The watchdog's thread looks only while a call is under
// way, so that a rank whose calls have all ended hears of it there and nowhere else. And what it
// makes of calls that end silently.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "core/clock.h"
#include "epcomm/error.h"
#include "kernels/cuda_error.h"
#include "kernels/mark.h"
#include "tests/cpp/ranks.h"
#include "transport/gpu_memory.h"
#include "transport/gpu_watchdog.h"

namespace epcomm {
namespace {

using testing::run_threads;

constexpr double kTimeout = 60;  // nothing here waits for it

// A rank's watchdog over its default stream.
class Watched {
 public:
  explicit Watched(Bootstrap& bootstrap, double timeout_s = kTimeout)
      : watchdog_(bootstrap, timeout_s, [this] { ++aborts_; }, [this] { return broken_.load(); }) {}

  GpuWatchdog& watchdog() { return watchdog_; }
  int aborts() const { return aborts_; }
  // Return when the GPU has made the mark.
  void begin(Operation operation) { mark(watchdog_.begin_mark(operation)); }
  void end(Operation operation) { mark(watchdog_.end_mark(operation)); }
  void call(Operation operation) {
    begin(operation);
    end(operation);
  }
  /// The connection breaks in the call that is under way: this rank gives up who is furthest behind
  /// it. Returns when the peers can know.
  void give_up() {
    broken_ = true;
    const Deadline deadline(kTimeout);
    while (aborts_ == 0 && !deadline.passed())
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_EQ(aborts_, 1);
  }

 private:
  static void mark(const Mark& mark) {
    launch_mark(mark, nullptr);
    EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  }
  // Before the watchdog, whose thread uses them.
  std::atomic<int> aborts_{0};
  std::atomic<bool> broken_{false};
  GpuWatchdog watchdog_;
};

struct Expected {
  int rank;
  Operation operation;
  uint64_t epoch;
  std::string why;
};

template <class Ask>
void expect_lost(const Expected& expected, Ask ask) {
  try {
    ask();
    ADD_FAILURE() << "nobody was lost; expected rank " << expected.rank;
  } catch (const PeerLost& lost) {
    EXPECT_EQ(lost.rank, expected.rank);
    EXPECT_EQ(lost.operation, expected.operation);
    EXPECT_EQ(lost.epoch, expected.epoch);
    EXPECT_NE(std::string(lost.what()).find(expected.why), std::string::npos) << lost.what();
  }
}

constexpr char kBroke[] = "the connection to it broke", kReported[] = "another rank reported it";

// Rank 0 never calls; rank 1 waits for it and gives it up; the calls of ranks 2 and 3 have ended.
TEST(Watchdog, CallsThatEndedAreNotBelievedOnceAPeerGaveARankUp) {
  constexpr int kLost = 0, kGivesUp = 1, kConfirms = 2, kWaits = 3, kRanks = 4;
  run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Watched watched(*bootstrap);
    GpuWatchdog& watchdog = watched.watchdog();
    Event ended;
    if (rank == kConfirms || rank == kWaits) {
      watched.call(Operation::kRoute);
      watched.call(Operation::kDispatch);
      EPCOMM_CUDA_TRY(cudaEventRecord(ended.get(), nullptr));
      EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
      EXPECT_NO_THROW(watchdog.wait(ended.get()));
    }
    EXPECT_NO_THROW(watchdog.confirm());
    bootstrap->barrier();
    if (rank == kGivesUp) {
      watched.begin(Operation::kRoute);
      watched.give_up();
    }
    bootstrap->barrier();
    if (rank == kLost) {
      try {
        watchdog.confirm();
        ADD_FAILURE() << "rank 0 was not told that it was given up";
      } catch (const Evicted& evicted) {
        EXPECT_EQ(evicted.by_rank, kGivesUp);
      }
    } else if (rank == kGivesUp) {
      expect_lost({kLost, Operation::kRoute, 1, kBroke}, [&] { watchdog.confirm(); });
    } else {
      // The last call that this rank has begun.
      expect_lost({kLost, Operation::kDispatch, 2, kReported}, [&] {
        if (rank == kWaits) return watchdog.wait(ended.get());
        watchdog.confirm();
      });
    }
    // It stays that way, and kernels that still wait were told once to leave.
    EXPECT_THROW(watchdog.check(), Error);
    EXPECT_THROW(watchdog.confirm(), Error);
    EXPECT_EQ(watched.aborts(), 1);
    bootstrap->barrier();
  });
}

// All have begun the call in which the connection breaks, so that nobody knows who is to blame.
TEST(Watchdog, ARankThatNobodyCanNameIsReportedToo) {
  constexpr int kGivesUp = 1, kRanks = 2;
  run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const bool gives_up = bootstrap->rank() == kGivesUp;
    Watched watched(*bootstrap);
    if (!gives_up) {
      watched.call(Operation::kCombine);
      watched.watchdog().drain();  // publishes the call; a second, as the peer's does not end
    }
    bootstrap->barrier();
    if (gives_up) {
      watched.begin(Operation::kCombine);
      watched.give_up();
    }
    bootstrap->barrier();
    expect_lost({-1, Operation::kCombine, 1, gives_up ? kBroke : kReported},
                [&] { watched.watchdog().confirm(); });
    EXPECT_EQ(watched.aborts(), 1);
    bootstrap->barrier();
  });
}

TEST(Watchdog, ARankThatAbandonsACallIsNamed) {
  constexpr int kAbandons = 1, kRanks = 3;
  run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Watched watched(*bootstrap);
    watched.call(Operation::kDispatch);
    bootstrap->barrier();
    if (bootstrap->rank() == kAbandons) watched.watchdog().abandon("it failed half-way");
    bootstrap->barrier();
    if (bootstrap->rank() != kAbandons) {
      expect_lost({kAbandons, Operation::kDispatch, 1, kReported},
                  [&] { watched.watchdog().confirm(); });
    } else {
      // Not Evicted: nobody else gave it up.
      try {
        watched.watchdog().check();
        ADD_FAILURE() << "the rank that abandoned a call goes on";
      } catch (const Evicted& evicted) {
        ADD_FAILURE() << evicted.what();
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("it failed half-way"), std::string::npos)
            << error.what();
      }
    }
    bootstrap->barrier();
  });
}

// Ranks on machines of their own, as far as their exchanges tell: nobody hears of the others.
class FarBootstrap final : public Bootstrap {
 public:
  explicit FarBootstrap(std::shared_ptr<Bootstrap> near) : near_(std::move(near)) {}
  int rank() const override { return near_->rank(); }
  int size() const override { return near_->size(); }
  bool in_process() const override { return true; }
  void all_gather(const void* in, void* out, size_t bytes) override {
    near_->all_gather(in, out, bytes);
    // The first byte of what names a machine (on_one_machine).
    for (int r = 0; r < size(); ++r)
      static_cast<char*>(out)[static_cast<size_t>(r) * bytes] = static_cast<char>('a' + r);
  }

 private:
  std::shared_ptr<Bootstrap> near_;
};

TEST(Watchdog, AcrossMachinesNobodyIsToldAndNobodyIsNamed) {
  constexpr int kGivesUp = 1, kRanks = 2;
  run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    FarBootstrap far(bootstrap);
    Watched watched(far);
    if (bootstrap->rank() == kGivesUp) {
      watched.begin(Operation::kDispatch);
      watched.give_up();
      expect_lost({-1, Operation::kDispatch, 1, kBroke}, [&] { watched.watchdog().confirm(); });
    }
    bootstrap->barrier();
    if (bootstrap->rank() != kGivesUp) {
      EXPECT_NO_THROW(watched.watchdog().confirm());
      EXPECT_EQ(watched.aborts(), 0);
    }
    bootstrap->barrier();
  });
}

// What kernels say whose calls end silently, played by the test.
class SilentCalls {
 public:
  explicit SilentCalls(GpuWatchdog& watchdog) : words_(*watchdog.progress()) {}
  void begin(Operation operation) {
    store(words_.begun, ++epoch_ << 8 | kEndsSilently | static_cast<uint64_t>(operation));
  }
  /// The newest call, or the one of another epoch, waits this long, and says so.
  void wait(double seconds, uint64_t epoch = 0) {
    const Deadline end(seconds);
    for (uint64_t ns = 1'000'000; !end.passed(); ns += 2'000'000) {
      store(words_.waits, wait_word(epoch == 0 ? epoch_ : epoch, ns));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  void give_up() { store(words_.gave_up, 1); }

 private:
  static void store(uint64_t& word, uint64_t value) {
    std::atomic_ref(word).store(value, std::memory_order_release);
  }
  ProgressWords& words_;
  uint64_t epoch_ = 0;
};

constexpr char kTimedOut[] = "it did not answer within the timeout";

TEST(Watchdog, OnlyCallsThatStillWaitAreLost) {
  constexpr double kShort = 0.4;
  run_threads(1, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Watched watched(*bootstrap, kShort);
    SilentCalls calls(watched.watchdog());
    const auto pass = [&] {
      std::this_thread::sleep_for(std::chrono::duration<double>(2 * kShort));
      EXPECT_NO_THROW(watched.watchdog().check());
    };
    calls.begin(Operation::kDispatch);
    pass();
    calls.begin(Operation::kCombine);
    calls.wait(kShort / 2);
    pass();
    // What an earlier call has said last says nothing of this one.
    calls.begin(Operation::kDispatch);
    calls.wait(2 * kShort, 2);
    pass();
    EXPECT_EQ(watched.aborts(), 0);
    calls.begin(Operation::kDispatch);
    const Deadline deadline(kTimeout);
    while (watched.aborts() == 0 && !deadline.passed()) calls.wait(0.01);
    expect_lost({-1, Operation::kDispatch, 4, kTimedOut}, [&] { watched.watchdog().check(); });
  });
}

// What a call has said before the process stood still is no sign that it waits when it goes on.
TEST(Watchdog, CallsThatEndedWhileTheProcessStoodStillAreNotLost) {
  constexpr double kShort = 0.4;
  run_threads(1, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    for (int i = 0; i < 3; ++i) {
      Watched watched(*bootstrap, kShort);
      SilentCalls calls(watched.watchdog());
      calls.begin(Operation::kDispatch);
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      if (::fork() == 0) {
        ::usleep(2 * static_cast<useconds_t>(kShort * 1e6));
        ::kill(::getppid(), SIGCONT);
        ::_exit(0);
      }
      calls.wait(0.0005);
      ::raise(SIGSTOP);
      ::wait(nullptr);
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      EXPECT_NO_THROW(watched.watchdog().check());
    }
  });
}

// The watchdog's thread may have been held up all the time.
TEST(Watchdog, AWaitThatAKernelGaveUpIsNotForgotten) {
  run_threads(1, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Watched watched(*bootstrap);
    SilentCalls calls(watched.watchdog());
    calls.begin(Operation::kCombine);
    EXPECT_NO_THROW(watched.watchdog().check());
    calls.give_up();
    expect_lost({-1, Operation::kCombine, 1, "it did not answer within twice the timeout"},
                [&] { watched.watchdog().check(); });
  });
}

// Nobody will say that they have ended.
TEST(Watchdog, DrainDoesNotWaitForCallsThatEndSilently) {
  constexpr int kRanks = 2;
  run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Watched watched(*bootstrap);
    SilentCalls calls(watched.watchdog());
    const Deadline late(kTimeout / 2);
    calls.begin(Operation::kDispatch);
    calls.wait(0.05);
    watched.watchdog().drain();
    EXPECT_FALSE(late.passed());
    EXPECT_NO_THROW(watched.watchdog().check());
    bootstrap->barrier();
  });
}

}  // namespace
}  // namespace epcomm

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  epcomm::testing::tested_transport.begin_rank = [](int rank) {
    EPCOMM_CUDA_TRY(cudaSetDevice(rank));
  };
  return RUN_ALL_TESTS();
}
