// A quantised dispatch and combine through the C++ API, with ranks as threads.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "epcomm/buffer.h"
#include "epcomm/quant.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using testing::Batch;
using testing::Received;

constexpr int kRanks = 3, kTokens = 5;
constexpr int kHidden = 256, kWide = 5248;  // one piece of a bulk copy, and two
constexpr double kTimeout = 60;

// Every token goes to every rank, so rank r's rows are received rows r * kTokens on, everywhere.
Batch make_batch(int rank, int hidden = kHidden) {
  Batch b;
  b.tokens = kTokens;
  b.topk = kRanks;
  b.hidden = hidden;
  for (int t = 0; t < kTokens; ++t)
    for (int k = 0; k < kRanks; ++k) b.topk_idx.push_back(k);
  for (int i = 0; i < kTokens * hidden; ++i)
    b.x.push_back(static_cast<float>((rank + 1) * (i % 37 - 18)) / 7);
  b.weights.assign(static_cast<size_t>(kTokens * kRanks), 1.0f);
  return b;
}

// Adds global_scale, which nvfp4 rows carry, to what args of a dispatch need.
DispatchArgs dispatch_args(Quant quant, const Batch& batch, const float* global_scale) {
  const QuantLayout layout = quant_layout(quant, batch.hidden);
  DispatchArgs args;
  args.x = batch.x.data();
  args.quant = quant;
  args.x_dtype = Dtype::kFloat32;
  args.global_scale = global_scale;
  args.dtype = quant == Quant::kNvfp4 ? Dtype::kUint8 : Dtype::kFloat8E4M3;
  args.row_bytes = layout.row_bytes;
  args.scale_bytes = layout.wire_scale_bytes;
  return args;
}

void check_dispatch(Buffer& buffer, Quant quant) {
  const int hidden = buffer.config().hidden;
  const Batch mine = make_batch(buffer.rank(), hidden);
  const QuantLayout layout = quant_layout(quant, hidden);
  Received to;
  testing::route(buffer, mine, Layout::kToken, 1, to);
  const int rows = to.num_rows;
  ASSERT_EQ(rows, kRanks * kTokens);
  to.meta = testing::memory_for(buffer, buffer.recv_meta_bytes(mine.topk, rows));
  const Allocation q = testing::memory_for(buffer, static_cast<size_t>(rows * layout.row_bytes));
  const Allocation scales =
      testing::memory_for(buffer, static_cast<size_t>(rows * layout.wire_scale_bytes));
  std::memset(q.data, 0x55, q.bytes);
  std::memset(scales.data, 0x55, scales.bytes);
  to.plan = to.plan.with_recv_block(to.meta.data);
  const float global = 0.25f + static_cast<float>(buffer.rank());
  DispatchArgs args = dispatch_args(quant, mine, &global);
  args.recv_x = q.data;
  args.recv_scales = scales.data;
  args.recv_capacity = args.row_capacity = rows;
  buffer.dispatch(to.plan, args);
  testing::tested_transport.finish_calls();

  for (int r = 0; r < kRanks; ++r) {
    Batch theirs = make_batch(r, hidden);
    const float their_global = 0.25f + static_cast<float>(r);
    std::vector<char> their_q(static_cast<size_t>(kTokens * layout.row_bytes)),
        their_scales(static_cast<size_t>(kTokens * layout.wire_scale_bytes));
    QuantizeArgs quantized;
    quantized.quant = quant;
    quantized.dtype = Dtype::kFloat32;
    quantized.num_rows = kTokens;
    quantized.hidden = hidden;
    quantized.x = theirs.x.data();
    quantized.q = their_q.data();
    quantized.scales = their_scales.data();
    quantized.global_scale = &their_global;
    quantized.scale_strides = {layout.wire_scale_bytes, quant == Quant::kNvfp4 ? 1 : 4, false};
    quantized.wire = true;
    quantize(quantized);
    EXPECT_EQ(std::memcmp(q.data + r * kTokens * layout.row_bytes, their_q.data(), their_q.size()),
              0);
    EXPECT_EQ(std::memcmp(scales.data + r * kTokens * layout.wire_scale_bytes, their_scales.data(),
                          their_scales.size()),
              0);
    float told;
    std::memcpy(&told, their_scales.data() + layout.wire_scale_bytes - 4, sizeof told);
    EXPECT_TRUE(quant != Quant::kNvfp4 || told == their_global);
  }
}

// Powers of two and their sums by ranks are exact in e4m3.
void check_combine(Buffer& buffer) {
  const Batch mine = make_batch(buffer.rank());
  Received to;
  testing::route(buffer, mine, Layout::kToken, 1, to);
  testing::dispatch(buffer, mine, to);
  for (int n = 0; n < to.num_rows; ++n)
    for (int h = 0; h < kHidden; ++h)
      to.row(n, kHidden)[h] = static_cast<float>((1 << h % 8) * (h % 2 == 0 ? 1 : -1) * 7);
  std::vector<float> y(mine.x.size(), -1);
  CombineArgs args;
  args.x = to.rows.data;
  args.out = y.data();
  args.dtype = Dtype::kFloat32;
  args.quant = Quant::kFp8;
  args.hidden = kHidden;
  buffer.combine(to.plan, args);
  testing::tested_transport.finish_calls();
  for (size_t i = 0; i < y.size(); ++i)
    ASSERT_EQ(y[i], kRanks * to.row(0, kHidden)[i % kHidden]) << i;
  args.quant = Quant::kNvfp4;
  EXPECT_THROW(buffer.combine(to.plan, args), InvalidArgument);
}

TEST(QuantBuffer, DispatchAndCombine) {
  testing::run_threads(kRanks, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    for (int hidden : {kHidden, kWide}) {
      Buffer buffer(bootstrap, testing::options_for(kRanks, hidden, kRanks, 8, kTimeout));
      for (Quant quant : {Quant::kFp8, Quant::kFp8Ue8m0, Quant::kNvfp4})
        check_dispatch(buffer, quant);
      if (hidden == kHidden && buffer.caps().combine_quants != 0) check_combine(buffer);
    }
  });
}

TEST(QuantBuffer, RefusesWhatItCannotQuantise) {
  testing::run_threads(1, kTimeout, [](std::shared_ptr<Bootstrap> bootstrap) {
    Buffer buffer(bootstrap, testing::options_for(kRanks, kHidden, kRanks, 8, kTimeout));
    const Batch mine = make_batch(0);
    Received to;
    testing::route(buffer, mine, Layout::kToken, 1, to);
    testing::dispatch(buffer, mine, to);
    const float global = 1;
    auto refuses = [&](auto&& change) {
      DispatchArgs args = dispatch_args(Quant::kNvfp4, mine, &global);
      change(args);
      EXPECT_THROW(buffer.dispatch(to.plan, args), InvalidArgument);
    };
    refuses([](DispatchArgs& a) { a.row_bytes *= 2; });
    refuses([](DispatchArgs& a) { a.scale_bytes -= 16; });
    refuses([](DispatchArgs& a) { a.x_dtype = Dtype::kUint8; });
    refuses([](DispatchArgs& a) { a.global_scale = nullptr; });
  });
}

}  // namespace
}  // namespace epcomm
