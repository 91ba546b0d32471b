// Small batches on simulated devices: every output and plan array must be what the path for large
// batches gives, bit for bit, however ranks and calls overlap. (That path is held against an
// oracle by buffer_test.cc, and so are the kernels for small batches where the host waits.)
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda_error.h"
#include "kernels/token_layout.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"
#include "tests/sim/runtime.h"

namespace epcomm {
namespace {

using testing::run_threads;

constexpr double kTimeout = 60;

struct Shape {
  int ranks, experts, topk, hidden, max_tokens;
};

// What all ranks do alike in one round, and what this rank sends.
struct Round {
  Layout layout;
  int alignment, topk;
  bool weighted, scaled, host_sync, wide_ids;
  Dtype combine_dtype;
  // Of this rank.
  int tokens, num_sms, delay_us;
  std::vector<int32_t> ids32;
  std::vector<int64_t> ids64;
  std::vector<float> weights;
  std::vector<uint8_t> x, scales, bias;
  unsigned salt;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }
  float real() { return static_cast<float>(static_cast<int>(engine_() % 4001) - 2000) / 256.0f; }

 private:
  std::mt19937 engine_;
};

// Rows of numbers of a dtype that round differently in every order of summing.
std::vector<uint8_t> numbers(Random& random, size_t count, Dtype dtype) {
  const size_t bytes = static_cast<size_t>(dtype_bytes(dtype));
  std::vector<uint8_t> out(count * bytes);
  for (size_t i = 0; i < count; ++i) {
    const float f = random.real() * 1.001f;
    const _Float16 half = static_cast<_Float16>(f);
    uint32_t word;
    std::memcpy(&word, &f, sizeof word);
    const uint16_t upper = static_cast<uint16_t>(word >> 16);
    const void* from = &f;
    if (dtype == Dtype::kFloat16) from = &half;
    if (dtype == Dtype::kBfloat16) from = &upper;
    std::memcpy(out.data() + i * bytes, from, bytes);
  }
  return out;
}

constexpr int kScaleBytes = 12;

Round make_round(const Shape& c, unsigned seed, int rank) {
  Random all(seed), random(seed * 31 + static_cast<unsigned>(rank) + 1);
  Round r;
  r.layout = std::vector{Layout::kToken, Layout::kExpert,
                         Layout::kPadded}[static_cast<size_t>(all.below(3))];
  r.alignment = r.layout == Layout::kExpert ? 1 << all.below(4) : 1;
  r.topk = 1 + all.below(c.topk);
  r.weighted = all.below(2) == 0;
  r.scaled = all.below(3) == 0;
  r.host_sync = all.below(4) == 0;
  r.wide_ids = all.below(2) == 0;
  r.combine_dtype = std::vector{Dtype::kBfloat16, Dtype::kFloat16,
                                Dtype::kFloat32}[static_cast<size_t>(all.below(3))];
  const bool one_expert = all.below(8) == 0;
  r.tokens = random.below(4) == 0 ? 0 : random.below(c.max_tokens + 1);
  r.num_sms = random.below(4);
  r.delay_us = random.below(3) == 0 ? random.below(1500) : 0;
  r.salt = seed;
  for (int i = 0; i < r.tokens * r.topk; ++i) {
    r.ids32.push_back(one_expert ? 1 : random.below(6) == 0 ? -1 : random.below(c.experts));
    r.ids64.push_back(r.ids32.back());
    r.weights.push_back(random.real());
  }
  const size_t tokens = static_cast<size_t>(r.tokens), hidden = static_cast<size_t>(c.hidden);
  r.x = numbers(random, tokens * hidden, Dtype::kBfloat16);
  r.scales = numbers(random, tokens * kScaleBytes / 4, Dtype::kFloat32);
  r.bias = numbers(random, tokens * hidden, r.combine_dtype);
  return r;
}

// One rank's calls of one round on one Buffer, and all memory behind them.
struct Calls {
  Calls(Buffer& buffer_, const Shape& shape_, const Round& round_, cudaStream_t stream_ = nullptr)
      : buffer(buffer_), shape(shape_), round(round_), stream(stream_) {}

  Buffer& buffer;
  const Shape& shape;
  Round round;  // a copy: its memory is read until the device is done
  cudaStream_t stream;
  Plan plan;
  int64_t capacity = 0, rows = 0;
  std::vector<int32_t> block;
  Allocation x, scales, meta;
  std::vector<uint8_t> idx, weights, combine_x, y;
  bool in_halves = false;
  std::function<void()> between = [] {};  // the halves

  static const void* given(const void* p) {
    static const uint64_t none[2] = {};
    return p == nullptr ? none : p;
  }
  int row_bytes() const { return round.scaled ? shape.hidden : 2 * shape.hidden; }
  int64_t index_bytes() const { return round.wide_ids ? 8 : 4; }
  int64_t entries() const { return round.layout == Layout::kToken ? capacity * round.topk : rows; }

  void route() {
    block.assign(buffer.send_block(round.tokens, round.topk).bytes / sizeof(int32_t), -7);
    RouteArgs args;
    args.topk_idx = round.wide_ids ? static_cast<const void*>(round.ids64.data())
                                   : static_cast<const void*>(round.ids32.data());
    args.index_type = round.wide_ids ? IndexType::kInt64 : IndexType::kInt32;
    args.num_tokens = round.tokens;
    args.topk = round.topk;
    args.layout = round.layout;
    args.expert_alignment = round.alignment;
    args.dtype = round.scaled ? Dtype::kUint8 : Dtype::kBfloat16;
    args.row_bytes = row_bytes();
    args.scale_bytes = round.scaled ? kScaleBytes : 0;
    args.weighted = round.weighted;
    args.host_sync = round.host_sync;
    args.plan = buffer.view_send_block(block.data(), round.tokens, round.topk);
    args.stream = stream;
    plan = buffer.route(args);
    capacity = round.host_sync ? plan.result.num_recv_tokens : buffer.max_recv_tokens();
    rows = round.host_sync ? plan.result.num_recv_rows
                           : buffer.max_recv_rows(round.layout, round.topk, round.alignment);
    auto make = [&](int64_t bytes) {
      Allocation a = testing::memory_for(buffer, static_cast<size_t>(bytes));
      EXPECT_NE(a.data, nullptr) << "the test's window is full";
      std::memset(a.data, 0xa5, a.bytes);
      return a;
    };
    meta = make(capacity * static_cast<int64_t>(buffer.recv_meta_bytes(round.topk, 1)));
    x = make(rows * row_bytes());
    scales = make(rows * kScaleBytes);
    idx.assign(static_cast<size_t>(entries() * index_bytes()), 0xa5);
    weights.assign(static_cast<size_t>(entries() * 4), 0xa5);
    plan = plan.with_recv_block(meta.data);
  }

  void dispatch(bool replay = false, bool weighted_replay = true) {
    DispatchArgs args;
    args.x = given(round.x.data());
    args.scales = round.scaled ? given(round.scales.data()) : nullptr;
    const bool weighted = round.weighted && (!replay || weighted_replay);
    args.topk_weights = weighted ? static_cast<const float*>(given(round.weights.data())) : nullptr;
    args.dtype = round.scaled ? Dtype::kUint8 : Dtype::kBfloat16;
    args.row_bytes = row_bytes();
    args.scale_bytes = round.scaled ? kScaleBytes : 0;
    args.recv_x = x.data;
    args.recv_scales = round.scaled ? scales.data : nullptr;
    args.recv_topk_idx = idx.data();
    args.recv_topk_weights = round.weighted ? reinterpret_cast<float*>(weights.data()) : nullptr;
    args.index_type = round.wide_ids ? IndexType::kInt64 : IndexType::kInt32;
    args.replay = replay;
    args.recv_capacity = static_cast<int32_t>(capacity);
    args.row_capacity = static_cast<int32_t>(rows);
    args.num_sms = round.num_sms;
    args.stream = stream;
    phases(args, [&] { buffer.dispatch(plan, args); });
  }

  void combine(bool weighted, bool biased) {
    Random random(round.salt * 7 + static_cast<unsigned>(buffer.rank()));
    if (combine_x.empty())
      combine_x = numbers(random, static_cast<size_t>(rows * shape.hidden), round.combine_dtype);
    y.assign(round.bias.size(), 0xa5);
    CombineArgs args;
    args.x = given(combine_x.data());
    args.topk_weights = weighted ? static_cast<const float*>(given(round.weights.data())) : nullptr;
    args.bias = biased ? given(round.bias.data()) : nullptr;
    args.out = y.data();
    args.dtype = round.combine_dtype;
    args.hidden = shape.hidden;
    args.num_sms = round.num_sms;
    args.stream = stream;
    phases(args, [&] { buffer.combine(plan, args); });
  }

  template <class Args, class Call>
  void phases(Args& args, Call call) {
    if (round.delay_us != 0) std::this_thread::sleep_for(std::chrono::microseconds(round.delay_us));
    if (!in_halves || !buffer.caps().two_phases) return call();
    args.phase = Phase::kSend;
    call();
    if (round.delay_us % 2 == 1) EPCOMM_CUDA_TRY(cudaDeviceSynchronize());
    between();
    args.phase = Phase::kReceive;
    call();
  }
};

void expect_same(const void* a, const void* b, size_t bytes, const std::string& what) {
  if (std::memcmp(a, b, bytes) == 0) return;
  size_t i = 0;
  while (static_cast<const char*>(a)[i] == static_cast<const char*>(b)[i]) ++i;
  ADD_FAILURE() << what << " differs, first at byte " << i << " of " << bytes;
}

void expect_same_dispatch(const Calls& small, const Calls& large, const std::string& what) {
  ASSERT_EQ(small.rows, large.rows);
  ASSERT_EQ(small.capacity, large.capacity);
  const PlanView &s = small.plan.view, &l = large.plan.view;
  const int ranks = small.shape.ranks, experts = small.shape.experts,
            locals = small.buffer.local_experts(), t = small.round.tokens, k = small.round.topk;
  auto same = [&](const int32_t* a, const int32_t* b, int count, const char* name) {
    expect_same(a, b, static_cast<size_t>(count) * sizeof(int32_t), what + ": plan's " + name);
  };
  same(s.topk_idx, l.topk_idx, t * k, "topk_idx");
  same(s.row, l.row, t * k, "row");
  same(s.slot, l.slot, t * ranks, "slot");
  same(s.rank_count, l.rank_count, ranks * ranks, "rank_count");
  same(s.expert_count, l.expert_count, ranks * experts, "expert_count");
  same(s.expert_offset, l.expert_offset, locals + 1, "expert_offset");
  same(s.tokens_per_expert, l.tokens_per_expert, locals, "tokens_per_expert");
  same(s.num_recv, l.num_recv, 1, "num_recv");
  same(s.first_row, l.first_row, t * ranks, "first_row");
  expect_same(small.meta.data, large.meta.data, small.meta.bytes, what + ": recv_meta");
  expect_same(small.x.data, large.x.data, small.x.bytes, what + ": recv_x");
  expect_same(small.scales.data, large.scales.data, small.scales.bytes, what + ": recv_scales");
  expect_same(small.idx.data(), large.idx.data(), small.idx.size(), what + ": recv_topk_idx");
  expect_same(small.weights.data(), large.weights.data(), small.weights.size(),
              what + ": recv_topk_weights");
}

BufferOptions options_for(const Shape& c, const char* path, double timeout_s = kTimeout) {
  BufferOptions options;
  options.transport = "nvlink";
  options.transport_options["path"] = path;
  options.config = {c.experts, c.hidden, c.topk, c.max_tokens, Dtype::kFloat32};
  options.timeout_s = timeout_s;
  return options;
}

// Runs body on every rank with its device, and reports what kernels did wrong.
void run_devices(int ranks, const std::function<void(std::shared_ptr<Bootstrap>)>& body) {
  SCOPED_TRACE("simulator's seed " + std::to_string(sim::options().seed));
  try {
    run_threads(ranks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
      EPCOMM_CUDA_TRY(cudaSetDevice(bootstrap->rank()));
      body(bootstrap);
      EPCOMM_CUDA_TRY(cudaDeviceSynchronize());
    });
  } catch (const std::exception& e) {
    ADD_FAILURE() << e.what();
  }
  for (const std::string& fault : sim::take_faults()) ADD_FAILURE() << fault;
  ++sim::options().seed;
}

void sync() { EPCOMM_CUDA_TRY(cudaDeviceSynchronize()); }

class SmallBatches : public ::testing::TestWithParam<Shape> {};

// Each round: the same calls on a large-batch Buffer, then on one of two small-batch Buffers,
// whole or in halves; then a replay of each.
TEST_P(SmallBatches, GiveWhatTheLargePathGives) {
  const Shape c = GetParam();
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), one(bootstrap, options_for(c, "small")),
        two(bootstrap, options_for(c, "auto"));
    ASSERT_TRUE(one.caps().small_batches && two.caps().small_batches);
    ASSERT_FALSE(large.caps().small_batches);
    const int rounds = c.max_tokens > 100 ? 3 : 14;
    for (unsigned seed = 1; seed <= static_cast<unsigned>(rounds); ++seed) {
      const Round round = make_round(c, seed + static_cast<unsigned>(c.ranks) * 100, rank);
      const std::string what = "round " + std::to_string(seed) + ", rank " + std::to_string(rank);
      Calls l{large, c, round}, s{seed % 3 == 0 ? two : one, c, round};
      s.in_halves = seed % 2 == 1;
      auto compare_combines = [&](bool weighted, bool biased, const std::string& which) {
        l.combine(weighted, biased);
        s.combine(weighted, biased);
        sync();
        expect_same(s.y.data(), l.y.data(), s.y.size(), which);
      };
      l.route();
      s.route();
      l.dispatch();
      s.dispatch();
      sync();
      expect_same_dispatch(s, l, what);
      compare_combines(false, seed % 4 < 2, what + ": y");
      compare_combines(true, seed % 4 == 0, what + ": weighted y");

      // Other rows with the same plan.
      Random random(seed);
      for (Calls* calls : {&l, &s}) {
        for (uint8_t& byte : calls->round.x) byte = static_cast<uint8_t>(byte * 5 + 1);
        for (float& weight : calls->round.weights) weight += 1.0f;
        std::memset(calls->x.data, 0x5a, calls->x.bytes);
        calls->dispatch(true, seed % 2 == 0);
      }
      sync();
      expect_same_dispatch(s, l, what + ", replayed");
      compare_combines(true, false, what + ": y of the replay");
    }
  });
}

INSTANTIATE_TEST_SUITE_P(All, SmallBatches,
                         ::testing::Values(Shape{1, 3, 2, 16, 9}, Shape{2, 5, 3, 16, 21},
                                           Shape{3, 7, 4, 528, 12}, Shape{4, 10, 4, 48, 17},
                                           Shape{2, 6, 4, 32, 150}, Shape{2, 40, 8, 16, 256}),
                         [](const auto& info) {
                           return "ranks" + std::to_string(info.param.ranks) + "tokens" +
                                  std::to_string(info.param.max_tokens);
                         });

// Calls that are enqueued without a pause, so that ranks run ahead of each other: staging that was
// used again too early would mix their rows up.
TEST(SmallBatchesInARow, DoNotDisturbEachOther) {
  const Shape c{3, 6, 3, 64, 24};
  for (int repeat = 0; repeat < 3; ++repeat)
    run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
      const int rank = bootstrap->rank();
      Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
      constexpr unsigned kRounds = 10;
      std::vector<std::unique_ptr<Calls>> expected, got;
      for (unsigned seed = 0; seed < kRounds; ++seed) {
        Round round = make_round(c, 500 + seed + static_cast<unsigned>(repeat) * kRounds, rank);
        round.host_sync = false;
        expected.push_back(std::make_unique<Calls>(large, c, round));
        got.push_back(std::make_unique<Calls>(small, c, round));
        Calls& l = *expected.back();
        l.route();
        l.dispatch();
        l.combine(round.weighted, true);
        sync();
      }
      for (auto& calls : got) {
        calls->route();
        calls->dispatch();
        calls->combine(calls->round.weighted, true);
      }
      sync();
      for (size_t i = 0; i < kRounds; ++i) {
        const std::string what = "call " + std::to_string(i) + ", rank " + std::to_string(rank);
        expect_same_dispatch(*got[i], *expected[i], what);
        expect_same(got[i]->y.data(), expected[i]->y.data(), got[i]->y.size(), what + ": y");
      }
    });
}

// A captured dispatch and combine, replayed with other rows and ids, with eager calls between.
TEST(SmallBatchesInAGraph, AreCountedOnTheDevice) {
  const Shape c{3, 6, 3, 32, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    auto fixed = [&](unsigned seed) {
      Round round = make_round(c, 900, rank), other = make_round(c, 900 + seed, rank);
      round.host_sync = false;
      Random random(seed * 5 + static_cast<unsigned>(rank));
      for (size_t i = 0; i < round.ids64.size(); ++i)
        round.ids64[i] = round.ids32[i] = random.below(c.experts + 1) - 1;
      for (uint8_t& byte : round.x) byte = static_cast<uint8_t>(random.below(256));
      for (float& weight : round.weights) weight = random.real();
      return round;
    };
    cudaStream_t stream;
    EPCOMM_CUDA_TRY(cudaStreamCreate(&stream));
    Calls captured{small, c, fixed(0), stream};
    EPCOMM_CUDA_TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    captured.route();
    captured.dispatch();
    captured.combine(captured.round.weighted, false);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    EPCOMM_CUDA_TRY(cudaStreamEndCapture(stream, &graph));
    EPCOMM_CUDA_TRY(cudaGraphInstantiate(&exec, graph, 0));
    for (unsigned seed = 1; seed < 8; ++seed) {
      const Round round = fixed(seed);
      Calls l{large, c, round}, eager{small, c, round, stream};
      for (Calls* calls : {&l, &eager}) {
        calls->route();
        calls->dispatch();
        calls->combine(round.weighted, false);
      }
      sync();
      std::memcpy(captured.round.ids32.data(), round.ids32.data(), round.ids32.size() * 4);
      std::memcpy(captured.round.ids64.data(), round.ids64.data(), round.ids64.size() * 8);
      std::memcpy(captured.round.x.data(), round.x.data(), round.x.size());
      std::memcpy(captured.round.weights.data(), round.weights.data(), round.weights.size() * 4);
      std::memset(captured.x.data, 0xa5, captured.x.bytes);
      std::memset(captured.scales.data, 0xa5, captured.scales.bytes);
      std::memset(captured.meta.data, 0xa5, captured.meta.bytes);
      EPCOMM_CUDA_TRY(cudaGraphLaunch(exec, stream));
      sync();
      const std::string what = "replay " + std::to_string(seed);
      expect_same_dispatch(captured, l, what);
      expect_same(captured.y.data(), l.y.data(), l.y.size(), what + ": y");
      expect_same(eager.y.data(), l.y.data(), l.y.size(), what + ": y of an eager call");
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    EPCOMM_CUDA_TRY(cudaStreamDestroy(stream));
  });
}

// The error that `call` throws or that the Buffer reports once the device is done, or "".
template <class Expected, class Call>
std::string error_of(Buffer& buffer, Call call) {
  try {
    call();
    sync();
    buffer.check_faults();
  } catch (const Expected& e) {
    return e.what();
  }
  return "";
}

// What ranks disagree on: every one of them says so, and the Buffer goes on.
TEST(SmallBatchesRefused, OnAllRanksAlike) {
  const Shape c{3, 6, 3, 32, 10};
  const std::vector<std::pair<std::string, void (*)(Round&)>> changes = {
      {"layout", [](Round& r) { r.layout = Layout::kPadded; }},
      {"topk_weights", [](Round& r) { r.weighted = !r.weighted; }},
      {"dtype", [](Round& r) { r.scaled = !r.scaled; }},
      {"operation", [](Round& r) { r.host_sync = true; }},
  };
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    unsigned seed = 1300;
    for (const auto& [field, change] : changes)
      for (const bool in_halves : {false, true}) {
        Round round = make_round(c, ++seed, rank);
        round.host_sync = false;
        round.layout = Layout::kExpert;
        Round odd = round;
        if (rank == 1) change(odd);
        Calls bad{small, c, odd};
        bad.in_halves = in_halves;
        const std::string text = error_of<ConfigMismatch>(small, [&] {
          bad.route();
          bad.dispatch();
        });
        EXPECT_NE(text.find(field), std::string::npos) << field << ": " << text;
        if (!odd.host_sync) {  // the plan says that nothing was sent
          const PlanView& view = bad.plan.view;
          EXPECT_EQ(*view.num_recv, 0) << field;
          for (int i = 0; i < c.ranks * c.ranks; ++i) EXPECT_EQ(view.rank_count[i], 0) << field;
          for (int i = 0; i < odd.tokens * c.ranks; ++i) EXPECT_EQ(view.slot[i], -1) << field;
          for (int i = 0; i < odd.tokens * odd.topk; ++i) EXPECT_EQ(view.row[i], -1) << field;
        }
        if (field != "operation" && field != "layout") {  // so a combine does no harm
          bad.combine(false, false);
          sync();
        }
        Calls l{large, c, round}, s{small, c, round};
        for (Calls* calls : {&l, &s}) {
          calls->route();
          calls->dispatch();
        }
        sync();
        expect_same_dispatch(s, l, "after a mismatch of " + field);
      }
  });
}

// dtype of x differs between ranks: refused by all, whichever half finds it.
TEST(SmallBatchesRefused, CombinesToo) {
  const Shape c{2, 6, 3, 32, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer small(bootstrap, options_for(c, "small"));
    for (unsigned seed = 0; seed < 8; ++seed) {
      Round round = make_round(c, 1400 + seed, rank);
      round.combine_dtype = rank == 0 ? Dtype::kBfloat16 : Dtype::kFloat32;
      Calls calls{small, c, round};
      calls.in_halves = seed % 2 == 0;
      calls.route();
      calls.dispatch();
      // The send half of a weighted combine finds it out, but it is told when the call is over.
      calls.between = [&] {
        sync();
        EXPECT_NO_THROW(small.check_faults());
      };
      const std::string text =
          error_of<ConfigMismatch>(small, [&] { calls.combine(seed % 4 < 2, false); });
      EXPECT_NE(text.find("dtype"), std::string::npos) << text;
      EXPECT_EQ(error_of<Error>(small, [] {}), "") << "reported twice";
    }
  });
}

TEST(SmallBatchesRefused, HalvesThatDoNotFit) {
  const Shape c{1, 6, 3, 32, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer small(bootstrap, options_for(c, "small")), large(bootstrap, options_for(c, "large"));
    Round round = make_round(c, 1500, 0);
    round.host_sync = false;
    Calls calls{small, c, round};
    calls.route();
    calls.dispatch();
    CombineArgs args;
    args.dtype = Dtype::kFloat32;
    args.hidden = c.hidden;
    calls.combine(false, false);
    args.x = calls.combine_x.data();
    calls.round.combine_dtype = Dtype::kFloat32;
    std::vector<uint8_t> x(static_cast<size_t>(calls.rows) * 4 * static_cast<size_t>(c.hidden));
    std::vector<float> y(calls.round.bias.size());
    args.x = x.data();
    args.out = y.data();
    args.phase = Phase::kReceive;
    EXPECT_THROW(small.combine(calls.plan, args), InvalidArgument);
    args.phase = Phase::kSend;
    small.combine(calls.plan, args);
    EXPECT_THROW(small.combine(calls.plan, args), InvalidArgument);
    EXPECT_THROW(calls.route(), InvalidArgument);
    args.phase = Phase::kReceive;
    small.combine(calls.plan, args);
    sync();

    Calls whole{large, c, round};
    whole.route();
    whole.dispatch();
    args.phase = Phase::kSend;
    EXPECT_THROW(large.combine(whole.plan, args), InvalidArgument);
    sync();
  });
}

TEST(SmallBatchesRefused, BadExpertIdsCountAsNone) {
  const Shape c{2, 6, 3, 32, 10};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    Buffer large(bootstrap, options_for(c, "large")), small(bootstrap, options_for(c, "small"));
    Round round = make_round(c, 1600, rank);
    round.host_sync = false;
    for (unsigned seed = 1601; round.tokens < 2 || round.topk < 2; ++seed) {
      round = make_round(c, 1600, rank);  // the same choices on all ranks
      Random random(seed);
      round.tokens = 4;
      round.ids32.assign(static_cast<size_t>(4 * round.topk), 2);
      round.ids64.assign(static_cast<size_t>(4 * round.topk), 2);
      round.weights.assign(static_cast<size_t>(4 * round.topk), 1.0f);
      round.x = numbers(random, 4 * static_cast<size_t>(c.hidden), Dtype::kBfloat16);
      round.scales = numbers(random, 4 * kScaleBytes / 4, Dtype::kFloat32);
      round.bias = numbers(random, 4 * static_cast<size_t>(c.hidden), round.combine_dtype);
      round.host_sync = false;
      break;
    }
    Round none = round, bad = round;
    const size_t last = round.ids32.size() - 1;
    for (int64_t id : {int64_t{c.experts}, int64_t{-2}}) {
      none.ids32[last] = -1;
      none.ids64[last] = -1;
      bad.ids32[last] = static_cast<int32_t>(id);
      bad.ids64[last] = id;
      Calls l{large, c, none}, s{small, c, bad};
      for (Calls* calls : {&l, &s}) {
        calls->route();
        calls->dispatch();
      }
      sync();
      expect_same_dispatch(s, l, "id " + std::to_string(id));
      const std::string text = error_of<InvalidArgument>(small, [&] { s.route(); });
      EXPECT_NE(text.find("is " + std::to_string(id)), std::string::npos) << text;
      EXPECT_NE(text.find("rank " + std::to_string(rank)), std::string::npos) << text;
    }
  });
}

// Rank 2 does not call: the others give up in time, in whatever they wait for.
TEST(SmallBatchesLost, APeerThatDoesNotCall) {
  const Shape c{3, 6, 3, 32, 10};
  constexpr double kShort = 0.5;
  for (int late = 0; late < 4; ++late)
    run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
      const int rank = bootstrap->rank();
      Buffer small(bootstrap, options_for(c, "small", kShort));
      Round round = make_round(c, 1700, rank);
      round.host_sync = false;
      Calls calls{small, c, round};
      calls.in_halves = late % 2 == 1;
      if (late >= 2) {
        calls.route();
        calls.dispatch();
        sync();
      }
      bootstrap->barrier();
      if (rank != 2) {
        const auto begin = std::chrono::steady_clock::now();
        const std::string text = error_of<PeerLost>(small, [&] {
          if (late < 2) {
            calls.route();
            calls.dispatch();
          } else {
            calls.combine(true, false);
          }
        });
        EXPECT_NE(text.find("rank 2"), std::string::npos) << text;
        EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(2));
        EXPECT_THROW(calls.combine(false, false), PeerLost);
      }
      bootstrap->barrier();
    });
}

TEST(SmallBatchesPath, IsChosenBySize) {
  const Shape c{2, 6, 3, 32, 256};
  run_devices(c.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    auto small_batches = [&](const Shape& shape, const char* path) {
      return Buffer(bootstrap, options_for(shape, path)).caps().small_batches;
    };
    EXPECT_TRUE(small_batches(c, "auto"));
    EXPECT_TRUE(small_batches(c, "small"));
    EXPECT_FALSE(small_batches(c, "large"));
    Shape wide = c;
    wide.max_tokens = 257;
    EXPECT_FALSE(small_batches(wide, "auto"));
    EXPECT_THROW(small_batches(wide, "small"), InvalidArgument);
    Shape many = c;
    many.experts = 2000;
    EXPECT_FALSE(small_batches(many, "auto"));
    EXPECT_THROW(small_batches(many, "small"), InvalidArgument);
    EXPECT_THROW(small_batches(c, "middle"), InvalidArgument);
    BufferOptions unknown = options_for(c, "auto");
    unknown.transport_options["road"] = "small";
    EXPECT_THROW(Buffer(bootstrap, unknown), InvalidArgument);
  });
}

}  // namespace
}  // namespace epcomm
