// Rows that are placed while later ones arrive (kernels/arrivals.cuh, place_arrived.cuh): against a
// peer whose rows come late and out of order, or not at all, and with blocks that do not all have
// an SM at a time.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "core/expert_map.h"
#include "kernels/cuda_error.h"
#include "kernels/link.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"
#include "tests/sim/runtime.h"

namespace epcomm {
namespace {

using testing::Batch;
using testing::Received;
using testing::run_threads;

// Options of the simulator for one test.
class Devices {
 public:
  Devices(int num_sms, int busy_sms) : before_(sim::options()) {
    sim::options().num_sms = num_sms;
    sim::options().busy_sms = busy_sms;
  }
  ~Devices() { sim::options() = before_; }

 private:
  sim::Options before_;
};

template <class T>
T* device_array(size_t count) {
  void* p = nullptr;
  EPCOMM_CUDA_TRY(cudaMalloc(&p, count * sizeof(T)));
  std::memset(p, 0, count * sizeof(T));
  return static_cast<T*>(p);
}

// Rank 0 of two runs the kernel on a device and sends nothing; rank 1 is played by the test. Every
// token that rank 1 sends has a row in each of rank 0's two groups: token t rows t and kTokens + t.
class PlayedPeer {
 public:
  static constexpr int kTokens = 61, kTopk = 3, kHidden = 20, kSenders = 3;
  static constexpr int kRowBytes = kHidden * static_cast<int>(sizeof(float));
  static constexpr int kScaleWords = 3;  // not a multiple of 16 bytes, so through registers

  explicit PlayedPeer(int num_sms, double timeout_s) : meta_(kTopk) {
    EPCOMM_CUDA_TRY(cudaSetDevice(0));
    EPCOMM_CUDA_TRY(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    const Dims dims = {2, 4, 2, kTopk, true};
    args_.link.control = ControlLayout(dims);
    args_.arrivals = ArrivalLayout(2, args_.link.control.arena);
    const size_t window_bytes = args_.arrivals.end + (1 << 20);
    for (int r = 0; r < 2; ++r) args_.link.window[r] = device_array<char>(window_bytes);
    args_.link.num_ranks = 2;
    args_.link.state = state_ = device_array<LinkState>(1);
    args_.link.report = device_array<LinkReport>(1);
    args_.link.progress = progress_ = device_array<uint64_t>(2);
    args_.link.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
    args_.dims = dims;
    args_.rows = {kRowBytes, kScaleWords * 4};
    args_.hidden = kHidden;
    const std::vector<int32_t> owner = {0, 0, 1, 1}, local = {0, 1, 0, 1};
    args_.experts = {copied(owner), copied(local)};
    args_.plan.rank_count = copied({0, 0, kTokens, 0});
    rows_ = reinterpret_cast<float*>(args_.link.window[0] + args_.arrivals.end);
    scales_ = rows_ + 2 * kTokens * kHidden;
    args_.plan.recv_meta = device_array<char>(kTokens * meta_.record_bytes);
    std::fill_n(rows_, 2 * kTokens * (kHidden + kScaleWords), kNaN);
    std::memset(args_.plan.recv_meta, 0x77, kTokens * meta_.record_bytes);
    args_.places = true;
    args_.most_senders = ArrivalLayout::kMaxSenders;
    PlaceArgs& place = args_.place;
    place.dims = dims;
    place.rows = args_.rows;
    place.layout = Layout::kExpert;
    place.index_type = IndexType::kInt64;
    place.recv_capacity = kTokens;
    place.row_capacity = 2 * kTokens;
    place.experts = args_.experts;
    place.plan = args_.plan;
    place.recv_x = reinterpret_cast<char*>(rows_);
    place.recv_scales = reinterpret_cast<char*>(scales_);
    place.recv_topk_idx = ids_ = device_array<int64_t>(2 * kTokens);
    place.recv_topk_weights = weights_ = device_array<float>(2 * kTokens);

    LinkEntry entry{};
    entry.senders = kSenders;
    std::memcpy(args_.link.window[0] + args_.link.control.entry(1, 1), &entry, sizeof entry);
    signal(&inbox(0, 1)->entered, 1);
    launch_send(args_, num_sms, stream_);
    const double begin = testing::now_s();
    while (std::atomic_ref(inbox(1, 0)->entered).load() != 1 && testing::now_s() < begin + 60)
      std::this_thread::yield();
  }
  ~PlayedPeer() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  void store(int t) {
    std::fill_n(rows_ + t * kHidden, kHidden, static_cast<float>(t + 1));
    std::fill_n(scales_ + t * kScaleWords, kScaleWords, static_cast<float>(-t - 1));
    int32_t* rows = meta_.row(args_.plan.recv_meta, t);
    int32_t* experts = meta_.topk_idx(args_.plan.recv_meta, t);
    float* weights = meta_.topk_weights(args_.plan.recv_meta, t);
    for (int k = 0; k < kTopk; ++k) {
      rows[k] = k == 2 ? -1 : t + k * kTokens;
      experts[k] = k == 2 ? 3 : k;
      weights[k] = static_cast<float>(t + k);
    }
    *meta_.token(args_.plan.recv_meta, t) = t;
  }
  // What a sender says: its part of the first count tokens is there; -1 = of all.
  void say(int sender, int count) {
    signal(reinterpret_cast<uint64_t*>(args_.link.window[0] + args_.arrivals.word(1, sender)),
           count < 0 ? ArrivalLayout::signal_all(1) : ArrivalLayout::signal(1, count));
  }
  void leave() { signal(&inbox(0, 1)->done, 1); }
  void wait() { EPCOMM_CUDA_TRY(cudaStreamSynchronize(stream_)); }
  bool ended() const { return progress_[1] != 0; }
  bool lost() const { return state_->lost != 0; }

  void check() const {
    for (int row = 0; row < 2 * kTokens; ++row) {
      const int t = row % kTokens;
      for (int h = 0; h < kHidden; ++h)
        ASSERT_EQ(rows_[row * kHidden + h], static_cast<float>(t + 1)) << "row " << row;
      for (int i = 0; i < kScaleWords; ++i)
        ASSERT_EQ(scales_[row * kScaleWords + i], static_cast<float>(-t - 1)) << "row " << row;
      ASSERT_EQ(ids_[row], row / kTokens) << "row " << row;
      ASSERT_EQ(weights_[row], static_cast<float>(t + row / kTokens)) << "row " << row;
    }
    EXPECT_TRUE(ended());
    EXPECT_FALSE(lost());
    EXPECT_EQ(state_->started, 0u);
    EXPECT_EQ(state_->taken[1], 0u);
  }

 private:
  static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  static int32_t* copied(const std::vector<int32_t>& values) {
    auto* p = device_array<int32_t>(values.size());
    std::copy(values.begin(), values.end(), p);
    return p;
  }
  static void signal(uint64_t* word, uint64_t value) {
    std::atomic_ref(*word).store(value, std::memory_order_release);
  }
  LinkInbox* inbox(int owner, int source) const {
    return reinterpret_cast<LinkInbox*>(args_.link.window[owner] +
                                        args_.link.control.inbox(source));
  }

  MetaLayout meta_;
  SendArgs args_{};
  cudaStream_t stream_ = nullptr;
  LinkState* state_;
  uint64_t* progress_;
  float *rows_, *scales_, *weights_;
  int64_t* ids_;
};

void pause() { std::this_thread::sleep_for(std::chrono::milliseconds(3)); }

// Tokens belong to sender t % 3. What one says covers its own tokens only, so a token is there when
// all three have said so; the rows behind the lowest count are stored as late as can be.
TEST(Arrivals, RowsAreTakenWhenAllTheirSendersHaveSaidSo) {
  constexpr int kTokens = PlayedPeer::kTokens, kSenders = PlayedPeer::kSenders;
  for (int num_sms : {1, 2, 3}) {
    const Devices devices(3, 0);
    std::mt19937 random(static_cast<unsigned>(num_sms));
    for (int round = 0; round < 4; ++round) {
      PlayedPeer peer(num_sms, 60);
      // Each sender goes its own way; the last but one round starts with the last sender's end.
      std::vector<int> at(kSenders, 0);
      auto go_on = [&](int sender, int to) {
        for (int t = at[static_cast<size_t>(sender)]; t < to; ++t)
          if (t % kSenders == sender) peer.store(t);
        at[static_cast<size_t>(sender)] = to;
        peer.say(sender, to == kTokens ? -1 : to);
      };
      if (round % 2 == 1) {
        go_on(2, kTokens);
        pause();
        go_on(1, kTokens);
        pause();
      }
      while (*std::min_element(at.begin(), at.end()) < kTokens) {
        const int sender = static_cast<int>(random() % kSenders);
        const int step = static_cast<int>(random() % 16);
        go_on(sender, std::min(at[static_cast<size_t>(sender)] + step, kTokens));
        if (random() % 3 == 0) pause();
      }
      EXPECT_FALSE(peer.ended());  // the peer may still touch this rank's memory
      peer.leave();
      peer.wait();
      peer.check();
    }
  }
  EXPECT_TRUE(sim::take_faults().empty());
}

TEST(Arrivals, RowsThatDoNotComeAreGivenUp) {
  for (int num_sms : {1, 3}) {
    const Devices devices(3, 0);
    PlayedPeer peer(num_sms, 0.05);
    for (int t = 0; t < 30; ++t) peer.store(t);
    peer.say(0, 30);
    peer.say(1, 30);  // the third sender says nothing
    peer.wait();
    EXPECT_TRUE(peer.lost());
    EXPECT_FALSE(peer.ended());
  }
  EXPECT_TRUE(sim::take_faults().empty());
}

// Dispatches in the layouts in which tokens have several rows; every rank knows what all send.
void dispatch_and_check(const Devices&, unsigned seed) {
  constexpr int kRanks = 3, kExperts = 6, kTopk = 4, kHidden = 4, kMaxTokens = 70;
  run_threads(kRanks, 60, [&](std::shared_ptr<Bootstrap> bootstrap) {
    BufferOptions options = testing::options_for(kExperts, kHidden, kTopk, kMaxTokens, 60);
    options.transport_options["path"] = "large";
    Buffer buffer(bootstrap, options);
    const int rank = bootstrap->rank();
    for (int round = 0; round < 3; ++round) {
      std::vector<Batch> all;
      std::mt19937 random(seed + static_cast<unsigned>(round));
      for (int r = 0; r < kRanks; ++r) {
        Batch batch{kMaxTokens - 20 * ((r + round) % 3), kTopk, kHidden, {}, {}, {}};
        for (int t = 0; t < batch.tokens; ++t) {
          std::vector<int32_t> ids = {0, 1, 2, 3, 4, 5};
          std::shuffle(ids.begin(), ids.end(), random);
          for (int k = 0; k < kTopk; ++k) {
            batch.topk_idx.push_back(ids[static_cast<size_t>(k)]);
            batch.weights.push_back(static_cast<float>(ids[static_cast<size_t>(k)] + 1));
          }
          for (int h = 0; h < kHidden; ++h)
            batch.x.push_back(static_cast<float>(1000 * r + 10 * t + h));
        }
        all.push_back(batch);
      }
      Received recv;
      const Layout layout = round % 2 == 0 ? Layout::kExpert : Layout::kPadded;
      testing::route(buffer, all[static_cast<size_t>(rank)], layout, 4, recv);
      testing::dispatch(buffer, all[static_cast<size_t>(rank)], recv);
      for (int local = 0; local < 2; ++local) {
        const int e = 2 * rank + local;
        int64_t row = recv.plan.view.expert_offset[local];
        for (const Batch& source : all)
          for (int t = 0; t < source.tokens; ++t) {
            const auto begin = source.topk_idx.begin() + t * kTopk;
            if (std::find(begin, begin + kTopk, e) == begin + kTopk) continue;
            EXPECT_TRUE(std::equal(recv.row(row, kHidden), recv.row(row + 1, kHidden),
                                   source.x.begin() + t * kHidden))
                << "row " << row << " on rank " << rank;
            EXPECT_EQ(recv.weights[static_cast<size_t>(row)], static_cast<float>(e + 1));
            ++row;
          }
      }
    }
  });
  EXPECT_TRUE(sim::take_faults().empty());
}

// Of the five blocks of each rank one runs at a time, not the first one first: none that waits for
// rows may keep those out that send them.
TEST(Arrivals, BlocksNeedNotRunTogether) { dispatch_and_check(Devices(5, 4), 1); }

// Who signals rows before they are written signals rows that are not there.
TEST(Arrivals, SignalsFollowStores) {
  const Devices devices(4, 0);
  sim::options().late_bulk_stores = true;
  dispatch_and_check(devices, 2);
}

}  // namespace
}  // namespace epcomm
