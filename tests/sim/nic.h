// A network card for simulated devices: puts and signals that land some time, in any order, but a
// signal after the put that it came with.
//
// A thread of its own works off what kernels have issued. What is put is read when it is sent, not
// when it is issued, and in pieces. Some cards do nothing for milliseconds, unless a quiet waits.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "tests/sim/random.h"

namespace epcomm::sim {

class Nic {
 public:
  /// window: of every PE, by its address here.
  Nic(std::vector<char*> window, int pe, uint64_t seed);
  /// What has not landed yet never does.
  ~Nic();

  void put_signal(int pe, size_t to, size_t from, size_t bytes, size_t word, uint64_t value);
  void signal(int pe, size_t word, uint64_t value);
  uint64_t issued() const;
  /// Has everything landed of which issued() spoke? Hurries it up.
  bool landed(uint64_t issued);

  /// Bytes that the cards of all ranks have been told to put so far, signals not counted.
  static uint64_t put_bytes();
  /// Puts of them.
  static uint64_t puts();
  /// The card behind a window, by its address.
  static Nic& of(const char* window);

 private:
  using Clock = std::chrono::steady_clock;
  struct Operation {
    uint64_t number = 0;
    int pe = 0;
    uint64_t after = 0;  // number of the put that has to land first; 0 = none
    size_t to = 0, from = 0;
    size_t bytes = 0;  // 0: a signal
    uint64_t value = 0;
    Clock::time_point earliest = {};
  };
  void issue(Operation operation);
  bool may_land(const Operation& operation) const;
  void land(const Operation& operation);
  void work();

  const std::vector<char*> window_;
  const int pe_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Random random_;
  std::vector<Operation> pending_;
  uint64_t issued_ = 0;
  uint64_t awaited_ = 0;  // up to this number, operations are waited for
  uint32_t lateness_us_;
  bool lazy_;
  bool stopped_ = false;
  std::thread thread_;
};

}  // namespace epcomm::sim
