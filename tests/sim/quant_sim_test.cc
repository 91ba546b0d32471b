// The kernels of quantisation on a simulated GPU: the bits of the host's functions, for every
// format, type of rows and place of scales. The conversion to e4m3 is that of kernels/quant.h here;
// on a GPU of sm_89 or later it is an instruction.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "core/host_rows.h"
#include "epcomm/quant.h"
#include "tests/sim/runtime.h"

namespace epcomm {
namespace {

constexpr int kRows = 19;
constexpr int64_t kColumn = 256;  // bytes between units of a row in column-major scales

enum class Scales { kRow, kColumn, kSwizzled, kWire };

struct Case {
  Quant quant;
  Dtype dtype;
  int hidden;
  Scales scales;
  bool any_bits;
};

std::vector<uint8_t> make_rows(const Case& c) {
  std::mt19937 random(7);
  const size_t count = static_cast<size_t>(kRows * c.hidden);
  std::vector<uint8_t> rows(count * static_cast<size_t>(dtype_bytes(c.dtype)));
  if (c.any_bits) {
    for (uint8_t& byte : rows) byte = static_cast<uint8_t>(random());
  } else {
    std::normal_distribution<float> normal;
    std::vector<float> numbers(count);
    for (float& x : numbers) x = normal(random);
    round_row(c.dtype, numbers.data(), rows.data(), static_cast<int>(count));
  }
  return rows;
}

// What one of the two implementations makes of rows. Bytes that it must not touch keep a pattern.
struct Made {
  std::vector<uint8_t> q, scales, back;
  float global = -1;
};

QuantizeArgs arguments(const Case& c, std::vector<uint8_t>& x, Made& made) {
  const QuantLayout layout = quant_layout(c.quant, c.hidden);
  const int64_t unit = c.quant == Quant::kNvfp4 ? 1 : 4;
  made.q.assign(static_cast<size_t>(kRows * layout.row_bytes) + 16, 0x55);
  made.scales.assign(1 << 16, 0x55);
  QuantizeArgs args;
  args.quant = c.quant;
  args.dtype = c.dtype;
  args.num_rows = kRows;
  args.hidden = c.hidden;
  args.x = x.data();
  args.q = made.q.data();
  args.scales = made.scales.data();
  args.global_scale = &made.global;
  args.wire = c.scales == Scales::kWire;
  if (c.scales == Scales::kRow) args.scale_strides = {layout.scale_bytes, unit, false};
  if (c.scales == Scales::kColumn) args.scale_strides = {unit, kColumn, false};
  if (c.scales == Scales::kSwizzled) args.scale_strides = {0, 0, true};
  if (c.scales == Scales::kWire) args.scale_strides = {layout.wire_scale_bytes, unit, false};
  return args;
}

Made on_host(const Case& c, std::vector<uint8_t> x) {
  Made made;
  global_scale(c.dtype, x.data(), kRows * c.hidden, &made.global);
  QuantizeArgs args = arguments(c, x, made);
  quantize(args);
  made.back.assign(x.size(), 0x55);
  args.wire = false;
  args.x = made.back.data();
  dequantize(args);
  return made;
}

Made on_device(const Case& c, std::vector<uint8_t> x) {
  Made made;
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  global_scale_cuda(c.dtype, x.data(), kRows * c.hidden, &made.global, stream);
  QuantizeArgs args = arguments(c, x, made);
  args.stream = stream;
  quantize_cuda(args);
  made.back.assign(x.size(), 0x55);
  args.wire = false;
  args.x = made.back.data();
  dequantize_cuda(args);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  cudaStreamDestroy(stream);
  return made;
}

// Of a NaN the payload is not defined.
bool same_numbers(Dtype dtype, const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
  const int count = static_cast<int>(a.size()) / dtype_bytes(dtype);
  std::vector<float> x(static_cast<size_t>(count)), y(x);
  load_row(dtype, a.data(), x.data(), count);
  load_row(dtype, b.data(), y.data(), count);
  for (size_t i = 0; i < x.size(); ++i)
    if (x[i] != y[i] && (x[i] == x[i] || y[i] == y[i])) return false;
  return true;
}

void check(const Case& c) {
  SCOPED_TRACE(testing::Message() << "quant " << static_cast<int>(c.quant) << ", dtype "
                                  << static_cast<int>(c.dtype) << ", hidden " << c.hidden
                                  << ", scales " << static_cast<int>(c.scales) << ", any bits "
                                  << c.any_bits);
  const std::vector<uint8_t> x = make_rows(c);
  const Made host = on_host(c, x), device = on_device(c, x);
  EXPECT_EQ(device.global, host.global);
  EXPECT_EQ(device.q, host.q);
  EXPECT_EQ(device.scales, host.scales);
  EXPECT_TRUE(same_numbers(c.dtype, device.back, host.back));
}

TEST(QuantSim, TheBitsAreThoseOfTheHost) {
  for (Quant quant : {Quant::kFp8, Quant::kFp8Ue8m0, Quant::kNvfp4})
    for (Dtype dtype : {Dtype::kBfloat16, Dtype::kFloat16, Dtype::kFloat32})
      for (int hidden : {128, 640, quant == Quant::kNvfp4 ? 96 : 384})
        for (Scales scales : {Scales::kRow, Scales::kColumn, Scales::kSwizzled, Scales::kWire})
          for (bool any_bits : {false, true})
            if (scales != Scales::kSwizzled || quant == Quant::kNvfp4)
              check({quant, dtype, hidden, scales, any_bits});
}

}  // namespace
}  // namespace epcomm
