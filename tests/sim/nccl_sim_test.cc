// What the nccl transport does differently from others.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "epcomm/buffer.h"
#include "epcomm/error.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"
#include "tests/sim/runtime.h"

namespace epcomm {
namespace {

using testing::Batch;
using testing::Received;
using testing::run_threads;

constexpr double kTimeout = 60;
constexpr int kRanks = 3, kExperts = 7, kHidden = 4, kTopk = 3;

using TransportOptions = std::map<std::string, std::string>;

// Tokens of rank 0; the others have fewer.
struct Size {
  int hidden, tokens, max_tokens;
};
constexpr Size kFourTiles = {kHidden, 900, 900};  // of tokens: chunks are cut between tiles
constexpr Size kWide = {1024, 40, 2100};          // rows of the own rank go aside in one chunk, too

// Values whose sums depend on their order.
Batch random_batch(int tokens, int hidden, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Batch b;
  b.tokens = tokens;
  b.topk = kTopk;
  b.hidden = hidden;
  for (int i = 0; i < tokens * kTopk; ++i) {
    b.topk_idx.push_back(static_cast<int32_t>(random() % (kExperts + 1)) - 1);
    b.weights.push_back(normal(random));
  }
  for (int i = 0; i < tokens * hidden; ++i) b.x.push_back(normal(random));
  return b;
}

// One rank's calls, one behind the other on one stream: what a call reads is written there just
// before it, what it writes is read there just behind it, and the host waits for nothing.
class QueuedCalls {
 public:
  QueuedCalls(Buffer& buffer, Layout layout, const Size& size) : buffer_(buffer), size_(size) {
    const int rank = buffer.rank();
    tokens_ = size.tokens / (rank == 1 ? 3 : 1) - 5 * rank;
    testing::route(buffer, batch(0), layout, 4, recv_);
    const int received = recv_.plan.result.num_recv_tokens;
    recv_.plan = recv_.plan.with_recv_block(nullptr);
    meta_.resize(buffer.recv_block_bytes(recv_.plan, received));
    recv_.plan = recv_.plan.with_recv_block(meta_.data());
    const size_t entries =
        static_cast<size_t>(layout == Layout::kToken ? received * kTopk : recv_.num_rows);
    rows_.resize(static_cast<size_t>(recv_.num_rows * size.hidden));
    topk_idx_.resize(entries);
    topk_weights_.resize(entries);
    weights_.resize(static_cast<size_t>(tokens_ * kTopk));
    x_.resize(static_cast<size_t>(tokens_ * size.hidden));
    y_.resize(x_.size());
  }
  // Replays the plan of the calls before with other rows; with other weights, or with none.
  void dispatch(bool weighted) {
    inputs_.push_back(batch(++calls_));
    set(x_, inputs_.back().x);
    set(weights_, inputs_.back().weights);
    clear(rows_);
    clear(topk_idx_);
    clear(topk_weights_);
    DispatchArgs args;
    args.x = x_.data();
    args.topk_weights = weighted ? weights_.data() : nullptr;
    args.dtype = Dtype::kFloat32;
    args.row_bytes = size_.hidden * static_cast<int>(sizeof(float));
    args.recv_x = rows_.data();
    args.recv_topk_idx = topk_idx_.data();
    args.recv_topk_weights = weighted ? topk_weights_.data() : nullptr;
    args.index_type = IndexType::kInt32;
    args.replay = calls_ > 1;
    args.recv_capacity = recv_.plan.result.num_recv_tokens;
    args.row_capacity = recv_.num_rows;
    buffer_.dispatch(recv_.plan, args);
    keep(rows_);
    keep(topk_idx_);
    keep(topk_weights_);
  }
  void combine(bool weighted) {
    clear(y_);
    CombineArgs args;
    args.x = rows_.data();
    args.topk_weights = weighted ? weights_.data() : nullptr;
    args.out = y_.data();
    args.dtype = Dtype::kFloat32;
    args.hidden = size_.hidden;
    buffer_.combine(recv_.plan, args);
    keep(y_);
  }
  // All that was kept, when it is there.
  std::vector<uint32_t> bits() {
    testing::finish(buffer_, [] {});
    std::vector<uint32_t> all;
    for (const auto& one : kept_) all.insert(all.end(), one.begin(), one.end());
    return all;
  }

 private:
  Batch batch(int call) const {
    return random_batch(tokens_, size_.hidden,
                        static_cast<unsigned>(100 * call + 10 + buffer_.rank()));
  }
  template <class T>
  static size_t bytes(const std::vector<T>& v) {
    return v.size() * sizeof(T);
  }
  static void set(std::vector<float>& to, const std::vector<float>& from) {
    cudaMemcpyAsync(to.data(), from.data(), bytes(to), cudaMemcpyDefault, nullptr);
  }
  template <class T>
  static void clear(std::vector<T>& v) {
    cudaMemsetAsync(v.data(), 0xff, bytes(v), nullptr);
  }
  template <class T>
  void keep(const std::vector<T>& v) {
    auto& to = kept_.emplace_back(v.size());
    cudaMemcpyAsync(to.data(), v.data(), bytes(v), cudaMemcpyDefault, nullptr);
  }

  Buffer& buffer_;
  Size size_;
  int tokens_ = 0, calls_ = 0;
  Received recv_;
  std::vector<char> meta_;
  std::vector<float> x_, weights_, rows_, topk_weights_, y_;
  std::vector<int32_t> topk_idx_;
  std::list<Batch> inputs_;
  std::list<std::vector<uint32_t>> kept_;
};

std::vector<uint32_t> bits_of_calls(Buffer& buffer, Layout layout, const Size& size) {
  QueuedCalls calls(buffer, layout, size);
  for (const bool weighted : {true, false, true}) {
    calls.dispatch(weighted);
    calls.combine(false);
    calls.combine(true);
  }
  return calls.bits();
}

std::vector<std::vector<uint32_t>> bits_of_ranks(const TransportOptions& given, Layout layout,
                                                 const Size& size) {
  std::vector<std::vector<uint32_t>> all(kRanks);
  run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    auto options = testing::options_for(kExperts, size.hidden, kTopk, size.max_tokens, kTimeout);
    options.transport_options = given;
    Buffer buffer(bootstrap, options);
    all[static_cast<size_t>(bootstrap->rank())] = bits_of_calls(buffer, layout, size);
  });
  return all;
}

std::string text(const TransportOptions& options) {
  std::string all;
  for (const auto& [name, value] : options) all += name + "=" + value + " ";
  return all;
}

// What the static exchange, which knows no chunks, gives.
TEST(Nccl, ChunksGiveTheSameBits) {
  const TransportOptions four_tiles[] = {
      {{"chunks", "1"}},
      {{"chunks", "2"}, {"schedule", "shifted"}},
      {{"chunks", "3"}},
      {{"chunks", "4"}, {"ctas", "32"}},
  };
  for (const Layout layout : {Layout::kToken, Layout::kExpert}) {
    auto expect_same = [layout](const Size& size, TransportOptions options,
                                const std::vector<std::vector<uint32_t>>& wanted) {
      options["algorithm"] = "exact";
      EXPECT_TRUE(wanted == bits_of_ranks(options, layout, size)) << text(options);
    };
    const auto wanted = bits_of_ranks({{"algorithm", "static"}}, layout, kFourTiles);
    for (const TransportOptions& options : four_tiles) expect_same(kFourTiles, options, wanted);
    const auto wide = bits_of_ranks({{"algorithm", "static"}}, layout, kWide);
    expect_same(kWide, {}, wide);
  }
}

// Rows through the peers' windows, which NCCL has no part in.
TEST(NcclWindow, GivesTheSameBits) {
  for (const Layout layout : {Layout::kToken, Layout::kExpert, Layout::kPadded}) {
    const Size size = {1024, 90, 200};
    const auto wanted = bits_of_ranks({{"algorithm", "static"}}, layout, size);
    EXPECT_TRUE(wanted == bits_of_ranks({{"algorithm", "window"}}, layout, size));
  }
}

// Of two ranks an all-gather moves the bytes of a static exchange.
TEST(Nccl, TwoRanksMayGather) {
  auto run = [](const TransportOptions& given) {
    std::vector<std::vector<uint32_t>> all(2);
    run_threads(2, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
      auto options = testing::options_for(kExperts, kHidden, kTopk, 40, kTimeout);
      options.transport_options = given;
      options.transport_options["algorithm"] = "static";
      Buffer buffer(bootstrap, options);
      all[static_cast<size_t>(bootstrap->rank())] =
          bits_of_calls(buffer, Layout::kToken, {kHidden, 40, 40});
    });
    return all;
  };
  EXPECT_EQ(run({}), run({{"schedule", "gathered"}}));
  auto options = testing::options_for(kExperts, kHidden, kTopk, 40, kTimeout);
  options.transport_options = {{"schedule", "gathered"}};
  run_threads(3, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
    EXPECT_THROW(Buffer(bootstrap, options), InvalidArgument);
  });
}

TEST(Nccl, OptionsAreChecked) {
  const TransportOptions refused[] = {
      {{"algorithm", "fast"}},    {{"schedule", ""}},  {{"chunks", "0"}},
      {{"chunks", "9"}},          {{"chunks", "two"}}, {{"ctas", "65"}},
      {{"ctas", "-1"}},           {{"buffers", "no"}}, {{"algorithm", "small"}},
      {{"schedule", "gathered"}}, {{"chunk", "1"}},    {{"algorithm", "window"}}};
  for (const TransportOptions& given : refused)
    run_threads(1, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
      auto options = testing::options_for(kExperts, kHidden, kTopk, 300, kTimeout);
      options.transport_options = given;
      try {
        Buffer buffer(bootstrap, options);
        ADD_FAILURE() << "took " << text(given);
      } catch (const InvalidArgument& e) {
        EXPECT_NE(std::string(e.what()).find(given.begin()->first), std::string::npos) << e.what();
      }
    });
}

// Two tokens of every rank to all ranks.
Batch batch_to_all() {
  return {2,
          3,
          kHidden,
          {0, 3, 6, 0, 3, 6},
          std::vector<float>(6, 1.0f),
          std::vector<float>(2 * kHidden, 1.0f)};
}

TEST(Nccl, ALostPeerIsNamed) {
  constexpr double kShort = 0.5;
  for (const bool combines : {false, true})
    run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
      Buffer buffer(bootstrap, testing::options_for(kExperts, kHidden, 3, 8, kShort));
      Received recv;
      testing::route(buffer, batch_to_all(), Layout::kToken, 1, recv);
      if (combines) testing::dispatch(buffer, batch_to_all(), recv);
      if (bootstrap->rank() != 2) {
        try {
          if (combines)
            testing::combine(buffer, batch_to_all(), recv);
          else
            testing::dispatch(buffer, batch_to_all(), recv);
          ADD_FAILURE() << "returned without rank 2";
        } catch (const PeerLost& lost) {
          EXPECT_EQ(lost.rank, 2);
          EXPECT_EQ(lost.operation, combines ? Operation::kCombine : Operation::kDispatch);
        }
        EXPECT_THROW(testing::combine(buffer, batch_to_all(), recv), PeerLost);
      }
      bootstrap->barrier();
    });
}

// NCCL of a rank finds the connection broken and refuses its call, before (0 ms) or after the
// rank's watchdog has looked: it is the peer that never comes that is lost, not the rank that NCCL
// told.
TEST(Nccl, ABrokenConnectionIsNotItsFindersFault) {
  constexpr int kGone = 0, kFinds = 1;
  for (const bool combines : {false, true})
    for (const int late_ms : {0, 600})
      run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
        const int rank = bootstrap->rank();
        Buffer buffer(bootstrap, testing::options_for(kExperts, kHidden, 3, 8, kTimeout));
        Received recv;
        testing::route(buffer, batch_to_all(), Layout::kToken, 1, recv);
        if (combines) testing::dispatch(buffer, batch_to_all(), recv);
        bootstrap->barrier();
        std::optional<sim::BrokenNccl> broken;
        if (rank == kFinds) broken.emplace(rank, late_ms);
        if (rank != kGone) {
          try {
            if (combines)
              testing::combine(buffer, batch_to_all(), recv);
            else
              testing::dispatch(buffer, batch_to_all(), recv);
            ADD_FAILURE() << "returned without rank " << kGone;
          } catch (const PeerLost& lost) {
            EXPECT_EQ(lost.rank, kGone) << "rank " << rank << ": " << lost.what();
            EXPECT_EQ(lost.operation, combines ? Operation::kCombine : Operation::kDispatch);
          } catch (const Error& error) {
            ADD_FAILURE() << "rank " << rank << ": " << error.what();
          }
        }
        broken.reset();
        bootstrap->barrier();
      });
}

}  // namespace
}  // namespace epcomm
