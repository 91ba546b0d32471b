// A rank whose kernel runs on a simulated device while the test plays its peer, and what such tests
// share.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "kernels/cuda_error.h"
#include "kernels/link.h"
#include "tests/cpp/ranks.h"
#include "tests/sim/runtime.h"

namespace epcomm::sim {

/// Options of the simulator for one test.
class Devices {
 public:
  Devices(int num_sms, int busy_sms) : before_(options()) {
    options().num_sms = num_sms;
    options().busy_sms = busy_sms;
  }
  ~Devices() { options() = before_; }

 private:
  Options before_;
};

/// Zeros.
template <class T>
T* device_array(size_t count) {
  void* p = nullptr;
  EPCOMM_CUDA_TRY(cudaMalloc(&p, count * sizeof(T)));
  std::memset(p, 0, count * sizeof(T));
  return static_cast<T*>(p);
}

inline int32_t* copied(const std::vector<int32_t>& values) {
  auto* p = device_array<int32_t>(values.size());
  std::copy(values.begin(), values.end(), p);
  return p;
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Rank 0 of two runs a kernel on a device and sends nothing; rank 1 is played by the test.
class PlayedLink {
 public:
  static constexpr int kSenders = 3;

  PlayedLink(const Dims& dims, double timeout_s) {
    EPCOMM_CUDA_TRY(cudaSetDevice(0));
    EPCOMM_CUDA_TRY(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    link_.control = ControlLayout(dims);
    arrivals_ = ArrivalLayout(2, link_.control.arena);
    const size_t window_bytes = arrivals_.end + (1 << 20);
    for (int r = 0; r < 2; ++r) link_.window[r] = device_array<char>(window_bytes);
    link_.num_ranks = 2;
    link_.state = device_array<LinkState>(1);
    link_.report = device_array<LinkReport>(1);
    link_.progress = device_array<ProgressWords>(1);
    link_.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
  }
  ~PlayedLink() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  PlayedLink(const PlayedLink&) = delete;
  PlayedLink& operator=(const PlayedLink&) = delete;

  /// What a sender says: its part of the first count tokens is there; -1 = of all.
  void say(int sender, int count) {
    signal(reinterpret_cast<uint64_t*>(link_.window[0] + arrivals_.word(1, sender)),
           count < 0 ? ArrivalLayout::signal_all(1) : ArrivalLayout::signal(1, count));
  }
  void leave() { signal(&inbox(0, 1)->done, 1); }
  void wait() { EPCOMM_CUDA_TRY(cudaStreamSynchronize(stream_)); }
  bool ended() const { return link_.progress->ended != 0; }
  bool lost() const { return link_.state->lost != 0; }
  void check_ended() const {
    EXPECT_TRUE(ended());
    EXPECT_FALSE(lost());
    EXPECT_EQ(link_.state->started, 0u);
    for (uint32_t taken : link_.state->taken) EXPECT_EQ(taken, 0u);
  }

 protected:
  /// Memory of rank 0's window that no control word is in.
  char* memory() const { return link_.window[0] + arrivals_.end; }
  void enter(LinkEntry entry) {
    entry.senders = kSenders;
    std::memcpy(link_.window[0] + link_.control.entry(1, 1), &entry, sizeof entry);
    signal(&inbox(0, 1)->entered, 1);
  }
  void wait_entered() const {
    const double begin = testing::now_s();
    while (std::atomic_ref(inbox(1, 0)->entered).load() != 1 && testing::now_s() < begin + 60)
      std::this_thread::yield();
  }
  static void signal(uint64_t* word, uint64_t value) {
    std::atomic_ref(*word).store(value, std::memory_order_release);
  }

  LinkArgs link_{};
  ArrivalLayout arrivals_ = ArrivalLayout(0, 0);
  cudaStream_t stream_ = nullptr;

 private:
  LinkInbox* inbox(int owner, int source) const {
    return reinterpret_cast<LinkInbox*>(link_.window[owner] + link_.control.inbox(source));
  }
};

}  // namespace epcomm::sim
