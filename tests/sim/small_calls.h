// Calls of small batches on simulated devices, made at random, and what they give.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "epcomm/quant.h"
#include "kernels/cuda_error.h"
#include "kernels/token_layout.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"
#include "tests/sim/runtime.h"

namespace epcomm::testing {

constexpr double kTimeout = 60;

struct Shape {
  int ranks, experts, topk, hidden, max_tokens;
};

// What all ranks do alike in one round, and what this rank sends.
struct Round {
  Layout layout;
  int alignment, topk;
  bool weighted, scaled, host_sync, wide_ids;
  bool ahead;     // with host_sync, of whole calls on a Buffer for small batches
  Quant quant;    // then not scaled
  Dtype x_dtype;  // of rows that are quantised
  Dtype combine_dtype;
  Quant combine_quant = Quant::kNone;
  // Of this rank.
  int tokens, num_sms, delay_us;
  std::vector<int32_t> ids32;
  std::vector<int64_t> ids64;
  std::vector<float> weights;
  std::vector<uint8_t> x, scales, bias;
  float global_scale;
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
inline std::vector<uint8_t> numbers(Random& random, size_t count, Dtype dtype) {
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

inline Dtype any_dtype(Random& random) {
  return std::vector{Dtype::kBfloat16, Dtype::kFloat16,
                     Dtype::kFloat32}[static_cast<size_t>(random.below(3))];
}

inline Round make_round(const Shape& c, unsigned seed, int rank) {
  Random all(seed), random(seed * 31 + static_cast<unsigned>(rank) + 1);
  Round r;
  r.layout = std::vector{Layout::kToken, Layout::kExpert,
                         Layout::kPadded}[static_cast<size_t>(all.below(3))];
  r.alignment = r.layout == Layout::kExpert ? 1 << all.below(4) : 1;
  r.topk = 1 + all.below(c.topk);
  r.weighted = all.below(2) == 0;
  r.scaled = all.below(3) == 0;
  const int waits = all.below(4);
  r.host_sync = waits < 2;
  r.ahead = waits == 0;
  r.wide_ids = all.below(2) == 0;
  r.combine_dtype = any_dtype(all);
  r.x_dtype = any_dtype(all);
  r.quant = Quant::kNone;
  if (c.hidden % 128 == 0 && !r.scaled)
    r.quant = std::vector{Quant::kFp8, Quant::kFp8Ue8m0,
                          Quant::kNvfp4}[static_cast<size_t>(all.below(3))];
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
  r.x = numbers(random, tokens * hidden, r.quant == Quant::kNone ? Dtype::kBfloat16 : r.x_dtype);
  r.global_scale = 0.01f + static_cast<float>(random.below(100)) / 3000;
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
  QuantLayout quantised() const { return quant_layout(round.quant, shape.hidden); }
  int row_bytes() const {
    if (round.quant != Quant::kNone) return quantised().row_bytes;
    return round.scaled ? shape.hidden : 2 * shape.hidden;
  }
  int scale_bytes() const {
    if (round.quant != Quant::kNone) return quantised().wire_scale_bytes;
    return round.scaled ? kScaleBytes : 0;
  }
  Dtype dtype() const {
    if (round.quant == Quant::kNone) return round.scaled ? Dtype::kUint8 : Dtype::kBfloat16;
    return round.quant == Quant::kNvfp4 ? Dtype::kUint8 : Dtype::kFloat8E4M3;
  }
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
    args.dtype = dtype();
    args.row_bytes = row_bytes();
    args.scale_bytes = scale_bytes();
    args.weighted = round.weighted;
    args.host_sync = round.host_sync;
    args.ahead = round.host_sync && round.ahead && !in_halves && buffer.caps().small_batches;
    args.plan = buffer.view_send_block(block.data(), round.tokens, round.topk);
    args.stream = stream;
    plan = buffer.route(args);
    const bool known = round.host_sync && !args.ahead;
    capacity = known ? plan.result.num_recv_tokens : buffer.max_recv_tokens();
    rows = known ? plan.result.num_recv_rows
                 : buffer.max_recv_rows(round.layout, round.topk, round.alignment);
    auto make = [&](int64_t bytes) {
      Allocation a = memory_for(buffer, static_cast<size_t>(bytes));
      EXPECT_NE(a.data, nullptr) << "the test's window is full";
      std::memset(a.data, 0xa5, a.bytes);
      return a;
    };
    meta = make(capacity * static_cast<int64_t>(buffer.recv_meta_bytes(round.topk, 1)));
    x = make(rows * row_bytes());
    scales = make(rows * scale_bytes());
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
    args.dtype = dtype();
    args.row_bytes = row_bytes();
    args.scale_bytes = scale_bytes();
    args.quant = round.quant;
    args.x_dtype = round.x_dtype;
    args.global_scale = &round.global_scale;
    args.recv_x = x.data;
    args.recv_scales = scale_bytes() != 0 ? scales.data : nullptr;
    args.recv_topk_idx = idx.data();
    args.recv_topk_weights = round.weighted ? reinterpret_cast<float*>(weights.data()) : nullptr;
    args.index_type = round.wide_ids ? IndexType::kInt64 : IndexType::kInt32;
    args.replay = replay;
    args.recv_capacity = static_cast<int32_t>(capacity);
    args.row_capacity = static_cast<int32_t>(rows);
    args.num_sms = round.num_sms;
    args.stream = stream;
    phases(args, [&] { buffer.dispatch(plan, args); });
    if (plan.result.unsettled) settle();
  }

  // What was received, of memory with room for the most.
  void settle() {
    EXPECT_TRUE(buffer.settle(plan));
    EXPECT_FALSE(plan.result.unsettled || plan.result.deferred);
    capacity = plan.result.num_recv_tokens;
    rows = plan.result.num_recv_rows;
    meta.bytes = static_cast<size_t>(capacity) * buffer.recv_meta_bytes(round.topk, 1);
    x.bytes = static_cast<size_t>(rows * row_bytes());
    scales.bytes = static_cast<size_t>(rows * scale_bytes());
    idx.resize(static_cast<size_t>(entries() * index_bytes()));
    weights.resize(static_cast<size_t>(entries() * 4));
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
    args.quant = round.combine_quant;
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

inline void expect_same(const void* a, const void* b, size_t bytes, const std::string& what) {
  if (std::memcmp(a, b, bytes) == 0) return;
  size_t i = 0;
  while (static_cast<const char*>(a)[i] == static_cast<const char*>(b)[i]) ++i;
  ADD_FAILURE() << what << " differs, first at byte " << i << " of " << bytes;
}

inline void expect_same_dispatch(const Calls& small, const Calls& large, const std::string& what) {
  ASSERT_EQ(small.rows, large.rows);
  ASSERT_EQ(small.capacity, large.capacity);
  EXPECT_EQ(small.plan.result.num_recv_tokens, large.plan.result.num_recv_tokens) << what;
  EXPECT_EQ(small.plan.result.num_recv_rows, large.plan.result.num_recv_rows) << what;
  EXPECT_EQ(small.plan.result.tokens_per_expert, large.plan.result.tokens_per_expert) << what;
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

inline BufferOptions options_for(const Shape& c, const char* path, double timeout_s = kTimeout) {
  BufferOptions options;
  options.transport = "nvlink";
  options.transport_options["path"] = path;
  // The transport whose small batches are tested; large ones are always nvlink's.
  const char* tested = std::getenv("EPCOMM_TEST_TRANSPORT");
  if (tested != nullptr && options.transport_options["path"] != "large") {
    options.transport = tested;
    options.transport_options.clear();
  }
  options.config = {c.experts, c.hidden, c.topk, c.max_tokens, Dtype::kFloat32};
  options.timeout_s = timeout_s;
  return options;
}

// Runs body on every rank with its device, and reports what kernels did wrong.
inline void run_devices(int ranks, const std::function<void(std::shared_ptr<Bootstrap>)>& body) {
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

inline void sync() { EPCOMM_CUDA_TRY(cudaDeviceSynchronize()); }

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

}  // namespace epcomm::testing
