#include "core/host_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace epcomm {
namespace {

struct Format {
  Dtype dtype;
  int mantissa_bits, bias;
  uint16_t infinity;
};
constexpr Format kHalf{Dtype::kFloat16, 10, 15, 0x7c00};
constexpr Format kBfloat16{Dtype::kBfloat16, 7, 127, 0x7f80};

// The value of non-negative bits, by the definition of the format. Infinity gets the value that
// would come next if exponents went on.
double value_of(const Format& f, uint16_t bits) {
  const int exponent = bits >> f.mantissa_bits, mantissa = bits & ((1 << f.mantissa_bits) - 1);
  const int implicit = exponent == 0 ? 0 : 1 << f.mantissa_bits;
  return std::ldexp(mantissa + implicit, std::max(exponent, 1) - f.bias - f.mantissa_bits);
}

// One row of many values, so that vector code and its tail both run.
std::vector<uint16_t> rounded(const Format& f, const std::vector<float>& values) {
  std::vector<uint16_t> bits(values.size(), 0xdead);
  round_row(f.dtype, values.data(), bits.data(), static_cast<int>(values.size()));
  return bits;
}

class HostRows : public ::testing::TestWithParam<Format> {};

TEST_P(HostRows, EveryValueConvertsBothWays) {
  const Format f = GetParam();
  std::vector<uint16_t> bits(f.infinity);
  for (uint16_t b = 0; b < f.infinity; ++b) bits[b] = b;
  std::vector<float> values(bits.size(), 0.0f);
  add_row(f.dtype, bits.data(), values.data(), static_cast<int>(bits.size()));
  for (uint16_t b = 0; b < f.infinity; ++b) ASSERT_EQ(values[b], value_of(f, b)) << b;
  EXPECT_EQ(rounded(f, values), bits);
  for (float& v : values) v = -v;
  for (uint16_t& b : bits) b |= 0x8000;
  EXPECT_EQ(rounded(f, values), bits);
}

TEST_P(HostRows, RoundsToNearestTiesToEven) {
  const Format f = GetParam();
  std::vector<float> values;
  std::vector<uint16_t> expected;
  for (uint16_t b = 0; b < f.infinity; ++b) {
    const auto next = static_cast<uint16_t>(b + 1);
    const auto middle = static_cast<float>((value_of(f, b) + value_of(f, next)) / 2);
    values.insert(values.end(), {std::nextafter(middle, 0.0f), middle,
                                 std::nextafter(middle, std::numeric_limits<float>::infinity())});
    expected.insert(expected.end(), {b, b % 2 == 0 ? b : next, next});
  }
  EXPECT_EQ(rounded(f, values), expected);
}

TEST_P(HostRows, KeepsInfinityAndNan) {
  const Format f = GetParam();
  const float infinity = std::numeric_limits<float>::infinity();
  const auto bits = rounded(f, {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(),
                                std::numeric_limits<float>::max()});
  EXPECT_EQ(bits[0], f.infinity);
  EXPECT_EQ(bits[1], f.infinity | 0x8000);
  EXPECT_GT(bits[2] & 0x7fff, f.infinity);
  EXPECT_EQ(bits[3], f.infinity);
  std::vector<float> back(bits.size(), 0.0f);
  add_row(f.dtype, bits.data(), back.data(), static_cast<int>(bits.size()));
  EXPECT_EQ(back[0], infinity);
  EXPECT_EQ(back[1], -infinity);
  EXPECT_TRUE(std::isnan(back[2]));
}

INSTANTIATE_TEST_SUITE_P(All, HostRows, ::testing::Values(kHalf, kBfloat16), [](const auto& info) {
  return info.param.dtype == Dtype::kFloat16 ? "fp16" : "bf16";
});

// w * row is 1 + 2^-11 + 2^-24: rounded first, the last term is lost; a fused multiply-add keeps
// it.
TEST(HostRowsSum, TheProductIsRoundedBeforeItIsAdded) {
  const float w = 1.0f + 0x1p-12f;
  const std::vector<float> row(37, w);
  std::vector<float> sum(row.size(), -(1.0f + 0x1p-11f));
  add_weighted_row(Dtype::kFloat32, row.data(), w, sum.data(), static_cast<int>(row.size()));
  EXPECT_EQ(sum, std::vector<float>(row.size(), 0.0f));
}

}  // namespace
}  // namespace epcomm
