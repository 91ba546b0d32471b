#include "kernels/quant.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

namespace epcomm {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

// Values of a format from its definition, in double.
std::vector<double> values(int mantissa, int bias, int codes) {
  std::vector<double> v;
  for (int c = 0; c < codes; ++c) {
    const int e = c >> mantissa, m = c & ((1 << mantissa) - 1);
    const double fraction = m / std::ldexp(1.0, mantissa);
    v.push_back(e == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, e - bias));
  }
  return v;
}

// The nearest value by trying them all; of two the one with the even code.
uint32_t nearest(const std::vector<double>& values, double x) {
  uint32_t best = 0;
  for (uint32_t c = 1; c < values.size(); ++c) {
    const double now = std::abs(values[c] - x), before = std::abs(values[best] - x);
    if (now < before || (now == before && c % 2 == 0)) best = c;
  }
  return best;
}

// All bf16 numbers, all ties between neighbours and the floats beside them.
std::vector<float> probes(const std::vector<double>& values) {
  std::vector<float> x;
  for (uint32_t h = 0; h < 0x8000; ++h) x.push_back(bits_float(h << 16));
  for (size_t c = 0; c + 1 < values.size(); ++c) {
    const float tie = static_cast<float>((values[c] + values[c + 1]) / 2);
    for (float f : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, kInf)}) x.push_back(f);
  }
  return x;
}

TEST(Quant, E4m3IsTheNearest) {
  const std::vector<double> all = values(3, 7, 127);
  EXPECT_EQ(all.back(), 448);
  for (uint32_t c = 0; c < all.size(); ++c) {
    EXPECT_EQ(e4m3_decode(c), all[c]);
    EXPECT_EQ(float_bits(e4m3_decode(c | 0x80)), float_bits(static_cast<float>(-all[c])));
  }
  EXPECT_TRUE(std::isnan(e4m3_decode(0x7f)) && std::isnan(e4m3_decode(0xff)));
  for (float x : probes(all)) {
    if (std::isnan(x)) continue;
    const uint32_t expected = nearest(all, std::min<double>(x, 448));
    ASSERT_EQ(e4m3_encode(x), expected) << x;
    ASSERT_EQ(e4m3_encode(-x), expected | 0x80) << -x;
  }
  EXPECT_EQ(e4m3_encode(kInf), 0x7eu);
  EXPECT_EQ(e4m3_encode(-kInf), 0xfeu);
  EXPECT_EQ(e4m3_encode(kNan), 0x7fu);
  EXPECT_EQ(e4m3_encode(-kNan), 0x7fu);
}

TEST(Quant, E2m1IsTheNearest) {
  const std::vector<double> all = values(1, 1, 8);
  EXPECT_EQ(all, (std::vector<double>{0, 0.5, 1, 1.5, 2, 3, 4, 6}));
  for (uint32_t c = 0; c < all.size(); ++c) {
    EXPECT_EQ(e2m1_decode(c), all[c]);
    EXPECT_EQ(float_bits(e2m1_decode(c | 8)), float_bits(static_cast<float>(-all[c])));
  }
  for (float x : probes(all)) {
    if (std::isnan(x)) continue;
    const uint32_t expected = nearest(all, std::min<double>(x, 6));
    ASSERT_EQ(e2m1_encode(x), expected) << x;
    ASSERT_EQ(e2m1_encode(-x), expected | 8) << -x;
  }
  EXPECT_EQ(e2m1_encode(kInf), 7u);
  EXPECT_EQ(e2m1_encode(-kInf), 15u);
  EXPECT_EQ(e2m1_encode(kNan), 7u);
  EXPECT_EQ(e2m1_encode(-kNan), 7u);
  EXPECT_EQ(e2m1_pair(1.0f, -6.0f), 0xf2u);
}

TEST(Quant, Fp8Scales) {
  for (float amax : {448.0f, 1.0f, 3.3e38f, 1e-30f, 449.0f}) {
    const GroupScale s = fp8_scale(float_bits(amax));
    EXPECT_EQ(bits_float(s.code), amax / 448.0f);
    EXPECT_EQ(s.inverse, 1.0f / (amax / 448.0f));
    EXPECT_EQ(e4m3_encode(amax * s.inverse), 0x7eu);
  }
  EXPECT_EQ(bits_float(fp8_scale(0).code), 1.0f);
  EXPECT_EQ(bits_float(fp8_scale(1).code), 0x1p-126f);  // a subnormal number
  EXPECT_EQ(fp8_scale(1).inverse, 0x1p126f);
  EXPECT_EQ(bits_float(fp8_scale(float_bits(kInf)).code), kInf);
  EXPECT_EQ(fp8_scale(kFloatInfinity + 1).code, kFloatNan);
  EXPECT_EQ(e4m3_encode(1.0f * fp8_scale(kFloatInfinity).inverse), kE4m3Nan);
}

TEST(Quant, Ue8m0ScaleIsTheLeastPowerOfTwo) {
  for (uint32_t h = 1; h < 0x7f80; ++h) {
    for (uint32_t amax : {h << 16, (h << 16) + 1, (h << 16) - 1}) {
      const GroupScale s = fp8_ue8m0_scale(amax);
      const double scale = std::ldexp(1.0, static_cast<int>(s.code) - 127);
      const double wanted = static_cast<double>(bits_float(amax)) / 448;  // exact enough: 53 bits
      ASSERT_EQ(ue8m0_decode(s.code), scale);
      ASSERT_EQ(s.inverse, 1 / scale);
      ASSERT_GE(scale, wanted) << amax;
      ASSERT_TRUE(s.code == 1 || scale / 2 < wanted) << amax;
    }
  }
  EXPECT_EQ(fp8_ue8m0_scale(float_bits(448.0f)).code, 127u);
  EXPECT_EQ(fp8_ue8m0_scale(float_bits(448.0f) + 1).code, 128u);
  EXPECT_EQ(fp8_ue8m0_scale(0).code, 127u);
  EXPECT_EQ(fp8_ue8m0_scale(kFloatInfinity).code, 255u);
  EXPECT_EQ(fp8_ue8m0_scale(kFloatNan).code, 255u);
  EXPECT_TRUE(std::isnan(ue8m0_decode(255)));
  EXPECT_EQ(ue8m0_decode(0), 0x1p-127f);
}

TEST(Quant, Nvfp4Scales) {
  const GlobalScale unit = make_global_scale(1.0f);
  EXPECT_EQ(nvfp4_scale(float_bits(6.0f), unit).code, e4m3_encode(1.0f));
  EXPECT_EQ(nvfp4_scale(float_bits(6.0f), unit).inverse, 1.0f);
  EXPECT_EQ(nvfp4_scale(float_bits(1e9f), unit).code, 0x7eu);  // saturates
  EXPECT_EQ(nvfp4_scale(0, unit).code, 0u);
  EXPECT_EQ(nvfp4_scale(0, unit).inverse, 0.0f);
  EXPECT_EQ(nvfp4_scale(kFloatInfinity, unit).code, 0x7fu);
  EXPECT_EQ(nvfp4_scale(kFloatNan, unit).code, 0x7fu);
  EXPECT_EQ(e2m1_encode(1.0f * nvfp4_scale(kFloatNan, unit).inverse), 7u);
  for (float no_scale : {0.0f, -1.0f, 1e-40f, kInf, kNan})
    for (uint32_t amax : {0u, 0x3f800000u})
      EXPECT_EQ(nvfp4_scale(amax, make_global_scale(no_scale)).code, 0x7fu) << no_scale;

  EXPECT_EQ(nvfp4_global_scale(float_bits(2688.0f)), 1.0f);
  EXPECT_EQ(nvfp4_global_scale(0), 1.0f);
  EXPECT_EQ(nvfp4_global_scale(1), kMinGlobalScale);
  // The largest element of a rank gets the largest scale and the largest code.
  for (uint32_t h = 1; h < 0x7f80; ++h) {
    const float amax = bits_float(h << 16);
    if (amax < 2688 * kMinGlobalScale) continue;
    const GlobalScale g = make_global_scale(nvfp4_global_scale(h << 16));
    const GroupScale s = nvfp4_scale(h << 16, g);
    ASSERT_EQ(s.code, 0x7eu) << amax;
    ASSERT_EQ(e2m1_encode(amax * s.inverse), 7u) << amax;
  }
}

TEST(Quant, Sizes) {
  const QuantLayout fp8 = make_quant_layout(Quant::kFp8, 7168),
                    ue8m0 = make_quant_layout(Quant::kFp8Ue8m0, 7168),
                    nvfp4 = make_quant_layout(Quant::kNvfp4, 7168);
  EXPECT_EQ(fp8.row_bytes, 7168);
  EXPECT_EQ(fp8.scale_bytes, 224);
  EXPECT_EQ(ue8m0.num_groups, 56);
  EXPECT_EQ(ue8m0.scale_bytes, 56);
  EXPECT_EQ(make_quant_layout(Quant::kFp8Ue8m0, 640).scale_bytes, 8);
  EXPECT_EQ(nvfp4.row_bytes, 3584);
  EXPECT_EQ(nvfp4.scale_bytes, 448);
  EXPECT_EQ(nvfp4.wire_scale_bytes, 464);
  EXPECT_EQ(make_quant_layout(Quant::kNvfp4, 192).wire_scale_bytes, 16);
}

TEST(Quant, SwizzleIsThatOfCublas) {
  EXPECT_EQ(swizzled_scale_offset(0, 3, 8), 3);
  EXPECT_EQ(swizzled_scale_offset(1, 0, 8), 16);
  EXPECT_EQ(swizzled_scale_offset(32, 0, 8), 4);
  EXPECT_EQ(swizzled_scale_offset(127, 3, 8), 511);
  EXPECT_EQ(swizzled_scale_offset(0, 4, 8), 512);
  EXPECT_EQ(swizzled_scale_offset(128, 0, 8), 1024);
  // Every place is used once, up to whole tiles.
  std::set<int64_t> seen;
  for (int64_t r = 0; r < 256; ++r)
    for (int g = 0; g < 12; ++g) seen.insert(swizzled_scale_offset(r, g, 10));
  EXPECT_EQ(static_cast<int64_t>(seen.size()), swizzled_scale_bytes(200, 10));
  EXPECT_EQ(*seen.rbegin(), swizzled_scale_bytes(200, 10) - 1);
}

TEST(Quant, LinearScales) {
  EXPECT_EQ(linear_scale_offset(Quant::kFp8, {.row = 40, .unit = 4}, 3, 2), 128);
  EXPECT_EQ(linear_scale_offset(Quant::kFp8, {.row = 4, .unit = 64}, 3, 2), 140);
  EXPECT_EQ(linear_scale_offset(Quant::kFp8Ue8m0, {.row = 8, .unit = 4}, 3, 6), 30);
  EXPECT_EQ(linear_scale_offset(Quant::kFp8Ue8m0, {.row = 4, .unit = 64}, 3, 6), 78);
  EXPECT_EQ(linear_scale_offset(Quant::kNvfp4, {.row = 16, .unit = 1}, 3, 6), 54);
}

}  // namespace
}  // namespace epcomm
