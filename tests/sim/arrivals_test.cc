// Rows that are placed or summed while later ones arrive (kernels/arrivals.cuh): against a
// peer whose rows come late and out of order, or not at all, and with blocks that do not all have
// an SM at a time.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "core/expert_map.h"
#include "kernels/cuda_error.h"
#include "kernels/link.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"
#include "tests/sim/played_link.h"
#include "tests/sim/runtime.h"

namespace epcomm {
namespace {

using sim::copied;
using sim::device_array;
using sim::Devices;
using sim::kNaN;
using sim::PlayedLink;
using testing::Batch;
using testing::Received;
using testing::run_threads;

// A dispatch. Every token that rank 1 sends has a row in each of rank 0's two groups: token t rows
// t and kTokens + t.
class PlayedPeer : public PlayedLink {
 public:
  static constexpr int kTokens = 61, kTopk = 3, kHidden = 20;
  static constexpr int kRowBytes = kHidden * static_cast<int>(sizeof(float));
  static constexpr int kScaleWords = 3;  // not a multiple of 16 bytes, so through registers

  explicit PlayedPeer(int num_sms, double timeout_s)
      : PlayedLink({2, 4, 2, kTopk, true}, timeout_s), meta_(kTopk) {
    const Dims dims = {2, 4, 2, kTopk, true};
    args_.link = link_;
    args_.arrivals = arrivals_;
    args_.dims = dims;
    args_.rows = {kRowBytes, kScaleWords * 4};
    args_.hidden = kHidden;
    const std::vector<int32_t> owner = {0, 0, 1, 1}, local = {0, 1, 0, 1};
    args_.experts = {copied(owner), copied(local)};
    args_.plan.rank_count = copied({0, 0, kTokens, 0});
    rows_ = reinterpret_cast<float*>(memory());
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
    enter({});
    launch_send(args_, num_sms, stream_);
    wait_entered();
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
    check_ended();
  }

 private:
  MetaLayout meta_;
  SendArgs args_{};
  float *rows_, *scales_, *weights_;
  int64_t* ids_;
};

// A combine. Every token of rank 0 has a row at rank 1, which pushes it, and every third one at
// rank 0 itself, whose rows lie outside the window or, if not `own_outside`, in it.
class PlayedPusher : public PlayedLink {
 public:
  static constexpr int kTokens = 61, kHidden = 20;
  static constexpr int kPushed = 2000;  // rows of rank 0 for rank 1, some pieces

  PlayedPusher(int num_sms, double timeout_s, bool own_outside)
      : PlayedLink({2, 4, 2, 1, true}, timeout_s) {
    constexpr int kOwn = (kTokens + 2) / 3;
    args_.link = link_;
    args_.arrivals = arrivals_;
    args_.dims = {2, 4, 2, 1, true};
    args_.dtype = Dtype::kFloat32;
    args_.hidden = kHidden;
    args_.num_tokens = args_.max_tokens = kTokens;
    std::vector<int32_t> slot;
    for (int t = 0; t < kTokens; ++t) {
      slot.push_back(t % 3 == 0 ? t / 3 : -1);
      slot.push_back(t);
    }
    args_.plan.slot = copied(slot);
    args_.plan.rank_count = copied({kOwn, kTokens, own_outside ? kPushed : 0, 0});
    staging_ = reinterpret_cast<float*>(memory());
    std::fill_n(staging_, 2 * kTokens * kHidden, kNaN);
    args_.staging = memory();
    float* own = staging_ + 2 * kTokens * kHidden;
    if (own_outside) own = device_array<float>((kOwn + kPushed) * kHidden);
    std::fill_n(own, kOwn * kHidden, 1000.0f);
    if (own_outside)
      for (int i = 0; i < kPushed; ++i)
        std::fill_n(own + (kOwn + i) * kHidden, kHidden, static_cast<float>(i));
    args_.most_senders = ArrivalLayout::kMaxSenders;
    if (own_outside) {
      args_.own_rows = reinterpret_cast<const char*>(own);
      args_.link.entry.pushed = 1;
    } else {
      args_.link.entry.rows =
          static_cast<uint64_t>(reinterpret_cast<const char*>(own) - link_.window[0]);
    }
    args_.push_to = arrivals_.end;
    out_ = device_array<float>(kTokens * kHidden);
    std::fill_n(out_, kTokens * kHidden, kNaN);
    args_.out = out_;
    LinkEntry entry{};
    entry.pushed = 1;
    enter(entry);
    launch_pull(args_, num_sms, stream_);
    wait_entered();
  }
  // Until all that rank 0 pushes is here, as its blocks say.
  void expect_pushed() const {
    const float* rows = reinterpret_cast<const float*>(link_.window[1] + args_.push_to);
    int32_t told = 0;
    for (const double begin = testing::now_s(); told < kPushed && testing::now_s() < begin + 30;) {
      told = kPushed;
      for (int sender = 0; sender < kSenders; ++sender) {
        auto* word = reinterpret_cast<uint64_t*>(link_.window[1] + arrivals_.word(0, sender));
        const uint64_t value = std::atomic_ref(*word).load(std::memory_order_acquire);
        told = std::min(told, ArrivalLayout::count(value, 1));
      }
      for (int i = 0; i < told * kHidden; ++i)
        ASSERT_EQ(rows[i], static_cast<float>(i / kHidden)) << told;
      std::this_thread::yield();
    }
    EXPECT_EQ(told, kPushed);
  }
  void store(int t) {
    std::fill_n(staging_ + (kTokens + t) * kHidden, kHidden, static_cast<float>(t + 1));
  }
  void check() const {
    for (int i = 0; i < kTokens * kHidden; ++i) {
      const int t = i / kHidden;
      ASSERT_EQ(out_[i], static_cast<float>(t + 1 + (t % 3 == 0 ? 1000 : 0))) << "token " << t;
    }
    check_ended();
  }

 private:
  PullArgs args_{};
  float *staging_, *out_;
};

void pause() { std::this_thread::sleep_for(std::chrono::milliseconds(3)); }

// Tokens belong to sender t % 3. What one says covers its own tokens only, so a token is there when
// all three have said so; the rows behind the lowest count are stored as late as can be.
template <class Peer>
void play_senders(Peer& peer, std::mt19937& random, bool some_at_once) {
  constexpr int kTokens = Peer::kTokens, kSenders = Peer::kSenders;
  // Each sender goes its own way; some rounds start with the last senders' ends.
  std::vector<int> at(kSenders, 0);
  auto go_on = [&](int sender, int to) {
    for (int t = at[static_cast<size_t>(sender)]; t < to; ++t)
      if (t % kSenders == sender) peer.store(t);
    at[static_cast<size_t>(sender)] = to;
    peer.say(sender, to == kTokens ? -1 : to);
  };
  if (some_at_once) {
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

TEST(Arrivals, RowsAreTakenWhenAllTheirSendersHaveSaidSo) {
  for (int num_sms : {1, 2, 3}) {
    const Devices devices(3, 0);
    std::mt19937 random(static_cast<unsigned>(num_sms));
    for (int round = 0; round < 4; ++round) {
      PlayedPeer peer(num_sms, 60);
      play_senders(peer, random, round % 2 == 1);
    }
  }
  EXPECT_TRUE(sim::take_faults().empty());
}

TEST(Arrivals, PushedRowsAreSummedWhenAllTheirSendersHaveSaidSo) {
  for (int num_sms : {1, 2, 3}) {
    const Devices devices(3, 0);
    std::mt19937 random(static_cast<unsigned>(num_sms));
    for (int round = 0; round < 4; ++round) {
      PlayedPusher peer(num_sms, 60, round >= 2);
      play_senders(peer, random, round % 2 == 1);
    }
  }
  EXPECT_TRUE(sim::take_faults().empty());
}

// The peer sends nothing before it has all rows: of five blocks that run one at a time, not the
// first one first, none may wait for its rows while others have some to push.
TEST(Arrivals, BlocksThatPushNeedNotRunTogether) {
  for (unsigned round = 0; round < 4; ++round) {
    const Devices devices(5, 4);
    std::mt19937 random(round);
    PlayedPusher peer(5, 60, true);
    peer.expect_pushed();
    play_senders(peer, random, round % 2 == 1);
  }
  EXPECT_TRUE(sim::take_faults().empty());
}

TEST(Arrivals, PushedRowsThatDoNotComeAreGivenUp) {
  for (int num_sms : {1, 3}) {
    const Devices devices(3, 0);
    PlayedPusher peer(num_sms, 0.05, true);
    for (int t = 0; t < 30; ++t) peer.store(t);
    peer.say(0, 30);
    peer.say(1, 30);  // the third sender says nothing
    peer.wait();
    EXPECT_TRUE(peer.lost());
    EXPECT_FALSE(peer.ended());
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

// Combines of rows that lie outside the window on some ranks; every rank knows what all have. The
// experts of rank r multiply by r + 1.
void combine_and_check(const Devices&, unsigned seed) {
  constexpr int kRanks = 3, kExperts = 6, kTopk = 2, kHidden = 1536, kMaxTokens = 70;
  run_threads(kRanks, 60, [&](std::shared_ptr<Bootstrap> bootstrap) {
    BufferOptions options = testing::options_for(kExperts, kHidden, kTopk, kMaxTokens, 60);
    options.transport_options["path"] = "large";
    Buffer buffer(bootstrap, options);
    const int rank = bootstrap->rank();
    for (int round = 0; round < 4; ++round) {
      std::mt19937 random(seed + 10 * static_cast<unsigned>(round) + static_cast<unsigned>(rank));
      Batch batch{kMaxTokens - 30 * ((rank + round) % 3), kTopk, kHidden, {}, {}, {}};
      for (int t = 0; t < batch.tokens; ++t) {
        const int first = static_cast<int>(random() % kExperts);
        batch.topk_idx.push_back(first);
        batch.topk_idx.push_back((first + 1 + static_cast<int>(random() % 5)) % kExperts);
        batch.weights.insert(batch.weights.end(), {1.0f, 1.0f});
        for (int h = 0; h < kHidden; ++h)
          batch.x.push_back(static_cast<float>(static_cast<int>(random() % 512) + h % 7));
      }
      Received recv;
      testing::route(buffer, batch, Layout::kToken, 1, recv);
      testing::dispatch(buffer, batch, recv);
      for (int64_t i = 0; i < int64_t{recv.num_rows} * kHidden; ++i)
        recv.row(0, kHidden)[i] *= static_cast<float>(rank + 1);
      // Round 0: all push. Others: all but some.
      const bool pushes = round == 0 || (rank + round) % 3 != 0;
      std::vector<float> outside(recv.row(0, kHidden), recv.row(recv.num_rows, kHidden));
      outside.resize(outside.size() + 4);
      std::vector<float> y(batch.x.size(), kNaN), bias(batch.x.size(), 3.0f);
      CombineArgs args;
      args.x = pushes ? static_cast<const void*>(outside.data()) : recv.rows.data;
      args.bias = round % 2 == 0 ? bias.data() : nullptr;
      args.out = y.data();
      args.dtype = Dtype::kFloat32;
      args.hidden = kHidden;
      args.num_sms = (rank + round) % 4;  // 0: as many as usual
      testing::finish(buffer, [&] { buffer.combine(recv.plan, args); });
      for (int t = 0; t < batch.tokens; ++t) {
        const int32_t* ids = batch.topk_idx.data() + t * kTopk;
        const int a = ids[0] / 2, b = ids[1] / 2;
        const auto factor = static_cast<float>(a == b ? a + 1 : a + b + 2);
        for (int h = 0; h < kHidden; ++h) {
          const size_t i = static_cast<size_t>(t) * kHidden + static_cast<size_t>(h);
          ASSERT_EQ(y[i], factor * batch.x[i] + (round % 2 == 0 ? 3.0f : 0.0f))
              << "token " << t << " on rank " << rank << ", round " << round;
        }
      }
    }
  });
  EXPECT_TRUE(sim::take_faults().empty());
}

// Of the five blocks of each rank one runs at a time, not the first one first: none that waits for
// rows may keep those out that send them.
TEST(Arrivals, BlocksNeedNotRunTogether) { dispatch_and_check(Devices(5, 4), 1); }
TEST(Arrivals, SomeRanksPush) { combine_and_check(Devices(4, 0), 3); }

// Who signals rows before they are written signals rows that are not there.
TEST(Arrivals, SignalsFollowStores) {
  const Devices devices(4, 0);
  sim::options().late_bulk_stores = true;
  dispatch_and_check(devices, 2);
  combine_and_check(devices, 2);
}

}  // namespace
}  // namespace epcomm
