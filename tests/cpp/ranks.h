// Ranks as threads or as processes, for tests.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "epcomm/bootstrap.h"
#include "epcomm/error.h"
#include "tests/cpp/tested_transport.h"

namespace epcomm::testing {

inline double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Runs body once per rank, each in its own thread, and rethrows the first exception in time: the
/// later ones are often of ranks that waited for the first.
inline void run_threads(int size, double timeout_s,
                        const std::function<void(std::shared_ptr<Bootstrap>)>& body) {
  auto bootstraps = make_in_process_bootstraps(size, timeout_s);
  std::mutex mutex;
  std::exception_ptr first;
  std::vector<std::thread> threads;
  for (const auto& bootstrap : bootstraps)
    threads.emplace_back([&] {
      try {
        tested_transport.begin_rank(bootstrap->rank());
        body(bootstrap);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (!first) first = std::current_exception();
      }
    });
  for (auto& thread : threads) thread.join();
  if (first) std::rethrow_exception(first);
}

/// A Bootstrap between forked processes, over memory that they share. Made before the fork.
class ForkedBootstrap final : public Bootstrap {
 public:
  ForkedBootstrap(int size, double timeout_s) : size_(size), timeout_s_(timeout_s) {
    void* p =
        ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared_ = new (p) Shared;
  }
  ~ForkedBootstrap() override { ::munmap(shared_, sizeof(Shared)); }
  void set_rank(int rank) { rank_ = rank; }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void all_gather(const void* in, void* out, size_t bytes) override {
    const uint64_t generation = shared_->generation.load();
    char* data = shared_->data[generation % 2];
    std::memcpy(data + static_cast<size_t>(rank_) * bytes, in, bytes);
    if (shared_->arrived.fetch_add(1) + 1 == size_) {
      shared_->arrived = 0;
      ++shared_->generation;
    }
    const double end = now_s() + timeout_s_;
    while (shared_->generation.load() == generation) {
      if (now_s() > end) throw PeerLost(-1, Operation::kInit, 0, "a forked rank did not come");
      ::usleep(100);
    }
    std::memcpy(out, data, static_cast<size_t>(size_) * bytes);
  }

 private:
  struct Shared {
    std::atomic<int> arrived{0};
    std::atomic<uint64_t> generation{0};
    char data[2][16384];
  };
  Shared* shared_;
  int size_, rank_ = 0;
  double timeout_s_;
};

/// Runs body once per rank, each in a forked process. Returns the exit status of each as waitpid
/// gives it: 0 if body returned true.
inline std::vector<int> run_processes(int size, double timeout_s,
                                      const std::function<bool(ForkedBootstrap&)>& body) {
  ForkedBootstrap bootstrap(size, timeout_s);
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      int code = 2;
      try {
        bootstrap.set_rank(rank);
        code = body(bootstrap) ? 0 : 1;
      } catch (const std::exception& e) {
        std::fprintf(stderr, "rank %d: %s\n", rank, e.what());
      }
      ::_exit(code);
    }
    children.push_back(pid);
  }
  std::vector<int> status(children.size(), -1);
  for (size_t r = 0; r < children.size(); ++r) ::waitpid(children[r], &status[r], 0);
  return status;
}

}  // namespace epcomm::testing
