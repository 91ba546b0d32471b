// Small batches whose blocks do not all run at the same time (kernels/link_brief.cuh): those that
// begin when others have ended must take staging for what it was before the call.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/small.h"
#include "tests/sim/played_link.h"
#include "tests/sim/runtime.h"

namespace epcomm {
namespace {

using sim::copied;
using sim::device_array;
using sim::Devices;
using sim::kNaN;

// A combine of sixteen blocks on a device that runs four at a time, in any order: the first eight
// send nothing and end, of the other eight each sums the tokens t with its number t % 8. Every
// token of rank 0 has a row at rank 1.
class PlayedPartials : public sim::PlayedLink {
 public:
  static constexpr int kTokens = 24, kHidden = 20, kBlocks = 16, kReceivers = 8;
  static constexpr int kRowBytes = kHidden * static_cast<int>(sizeof(float));

  // before: what staging holds when the first call begins.
  explicit PlayedPartials(uint32_t before)
      : PlayedLink(kDims, 60), small_(kDims, kTokens, kRowBytes, link_.control.arena) {
    auto* words = reinterpret_cast<uint32_t*>(link_.window[0] + small_.rows);
    std::fill_n(words, (small_.end - small_.rows) / sizeof(uint32_t), before);
    args_.small = small_;
    args_.dims = kDims;
    args_.dtype = Dtype::kFloat32;
    args_.hidden = kHidden;
    args_.num_tokens = kTokens;
    std::vector<int32_t> slot;
    for (int t = 0; t < kTokens; ++t) slot.insert(slot.end(), {-1, t});
    args_.plan.slot = copied(slot);
    args_.plan.rank_count = copied({0, kTokens, 0, 0});
    args_.plan.recv_meta = device_array<char>(MetaLayout(kDims.topk).record_bytes);
    args_.out = out_ = device_array<float>(kTokens * kHidden);
  }
  void launch() {
    ++epoch_;
    std::fill_n(out_, kTokens * kHidden, kNaN);
    args_.link = link_;
    left_before_ = link_.state->left;
    peer_link_kernels().combine(args_, kBlocks, stream_);
    // Of rank 0, too: the block that announces may be one of those that wait for room.
    for (int source : {0, 1}) {
      auto* brief =
          reinterpret_cast<uint64_t*>(link_.window[0] + link_.control.brief(source, epoch_));
      for (int i = 0; i < LinkBrief::kWords; ++i) signal(brief + i, TaggedWord::of(epoch_, 0));
    }
  }
  // The tokens for which mine is true, with the signals of their shares.
  void send(const std::function<bool(int)>& mine) {
    for (int t = 0; t < kTokens; ++t) {
      if (!mine(t)) continue;
      auto* row = reinterpret_cast<uint32_t*>(link_.window[0] + small_.row(1, epoch_, t));
      const float value = value_of(t);
      uint32_t word = 0;
      std::memcpy(&word, &value, sizeof word);
      for (int h = 0; h < kHidden; ++h)
        std::atomic_ref(row[h]).store(word, std::memory_order_relaxed);
      signal(reinterpret_cast<uint64_t*>(link_.window[0] + small_.signal(1, t)), epoch_);
    }
  }
  // Until so many blocks of the call have ended.
  bool blocks_ended(uint32_t count) const {
    const double begin = testing::now_s();
    std::atomic_ref<uint32_t> left(link_.state->left);
    while (left.load() - left_before_ < count) {
      if (testing::now_s() > begin + 30) return false;
      std::this_thread::yield();
    }
    return true;
  }
  void check() {
    wait();
    for (int i = 0; i < kTokens * kHidden; ++i)
      ASSERT_EQ(out_[i], value_of(i / kHidden)) << "token " << i / kHidden;
    EXPECT_FALSE(lost());
    EXPECT_EQ(link_.state->epoch, epoch_);
    EXPECT_EQ(link_.state->arrived, 0u);
    EXPECT_EQ(link_.state->left, link_.state->blocks);
    EXPECT_NE(link_.state->clean[epoch_ & 1], 0u);
    const auto* words =
        reinterpret_cast<const uint32_t*>(link_.window[0] + small_.row(0, epoch_, 0));
    for (size_t i = 0; i < 2 * small_.rows_step / sizeof(uint32_t); ++i)
      ASSERT_EQ(words[i], SmallLayout::kUnwritten) << "word " << i;
  }

 private:
  static constexpr Dims kDims = {2, 4, 2, 1, true};
  float value_of(int t) const { return static_cast<float>(1000 * epoch_ + t + 1); }

  SmallLayout small_;
  SmallCombineArgs args_{};
  uint64_t epoch_ = 0;
  uint32_t left_before_ = 0;
  float* out_;
};

// In the first calls staging is not clean, so that only signals say what has come; in later ones it
// is. Rows of two blocks come when all others have ended, among them the one that says that staging
// is clean now: some of the two have begun after that.
TEST(SmallBatchesLateBlocks, TakeStagingForWhatItWas) {
  const Devices devices(PlayedPartials::kBlocks, PlayedPartials::kBlocks - 1);
  for (int round = 0; round < 7; ++round) {
    PlayedPartials peer(round % 3 == 0   ? 0u
                        : round % 3 == 1 ? 0x12345678u
                                         : SmallLayout::kUnwritten);
    auto late = [&](int t) {
      const int receiver = t % PlayedPartials::kReceivers;
      return receiver == 1 + round % 7 || receiver == 1 + (round + 3) % 7;
    };
    for (int call = 0; call < 4; ++call) {
      peer.launch();
      peer.send([&](int t) { return !late(t); });
      ASSERT_TRUE(peer.blocks_ended(PlayedPartials::kBlocks - 2));
      std::this_thread::sleep_for(std::chrono::milliseconds(3));  // the two begin, and look
      peer.send(late);
      peer.check();
      if (HasFatalFailure()) return;
    }
  }
  EXPECT_TRUE(sim::take_faults().empty());
}

}  // namespace
}  // namespace epcomm
