// Quantised formats, one element and one group at a time: what every byte is. The same bits on the
// host and on the device; plain C++ where there is no CUDA. docs/quantisation.md says it in words.
//
// A group of elements shares a scale, made from amax, the largest magnitude of the group. amax is
// carried as the bits of |x|, so that the integer maximum is also right for infinities and NaN: it
// is not finite if any element is not.
//
//   kFp8       scale = amax / 448; 1 where amax is 0; at least 2^-126 (so that 1 / scale is
//              finite). q = e4m3(x * (1 / scale)).
//   kFp8Ue8m0  scale = the least power of two >= amax / 448; else as kFp8.
//   kNvfp4     scale = e4m3(amax * (1 / (6 * global))), q = e2m1(x * (1 / (scale * global))).
//
// Every operation above is rounded to fp32 on its own. A group with a NaN or an infinity gets a
// scale that is not finite, and the code of NaN (e4m3) or 7 (e2m1) in all its elements.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "epcomm/types.h"
#include "kernels/token_layout.h"

namespace epcomm {

constexpr int kFp8Group = 128;  ///< elements that share a scale; DeepSeek-V3 (arXiv 2412.19437) 3.3
constexpr int kNvfp4Group = 16;               ///< elements that share a scale
constexpr float kE4m3Max = 448;               ///< OCP OFP8 1.0
constexpr float kE2m1Max = 6;                 ///< OCP MX 1.0
constexpr float kMinGlobalScale = 0x1p-117f;  ///< scale * global is then a normal number, or 0
constexpr uint32_t kFloatInfinity = 0x7f800000;
constexpr uint32_t kFloatNan = 0x7fc00000;
constexpr uint32_t kE4m3Nan = 0x7f;
constexpr uint32_t kUe8m0Nan = 0xff;
constexpr uint32_t kUe8m0One = 127;

// ---- fp32, one rounding per operation: the device compiler would fuse a product with a sum ----

EPCOMM_HOST_DEVICE inline uint32_t float_bits(float f) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(f);
#else
  return std::bit_cast<uint32_t>(f);
#endif
}
EPCOMM_HOST_DEVICE inline float bits_float(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  return std::bit_cast<float>(u);
#endif
}
EPCOMM_HOST_DEVICE inline float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
EPCOMM_HOST_DEVICE inline float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
EPCOMM_HOST_DEVICE inline float div_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
/// Bits of |x|: as integers they order all magnitudes, NaN above infinity.
EPCOMM_HOST_DEVICE inline uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

// ---- elements ----

/// A float of few bits: sign, exponent, kMantissa bits; 2^kMinExponent is its least normal number.
template <int kMantissa, int kMinExponent>
struct MiniFloat {
  static constexpr int kDropped = 23 - kMantissa;
  static constexpr uint32_t kBias = static_cast<uint32_t>(126 + kMinExponent) << 23;
  static constexpr uint32_t kMinNormal = static_cast<uint32_t>(127 + kMinExponent) << 23;
  // A float whose last bit is worth the distance between subnormals: adding it rounds to them.
  static constexpr uint32_t kMagic = static_cast<uint32_t>(127 + kMinExponent + kDropped) << 23;

  /// To nearest, ties to even, at most max_code. Selections without branches, so loops vectorise.
  static EPCOMM_HOST_DEVICE inline uint32_t encode(uint32_t magnitude, uint32_t max_bits,
                                                   uint32_t max_code) {
    constexpr uint32_t kHalf = (1u << (kDropped - 1)) - 1;
    const uint32_t normal = (magnitude - kBias + kHalf + ((magnitude >> kDropped) & 1)) >> kDropped;
    const uint32_t subnormal =
        float_bits(add_rn(bits_float(magnitude), bits_float(kMagic))) - kMagic;
    const uint32_t code = magnitude < kMinNormal ? subnormal : normal;
    return magnitude >= max_bits ? max_code : code;
  }
  static EPCOMM_HOST_DEVICE inline uint32_t decode(uint32_t code) {
    constexpr uint32_t kStep = static_cast<uint32_t>(127 + kMinExponent - kMantissa) << 23;
    const uint32_t subnormal =
        float_bits(mul_rn(static_cast<float>(static_cast<int32_t>(code)), bits_float(kStep)));
    return code < (1u << kMantissa) ? subnormal : (code << kDropped) + kBias;
  }
};
using E4m3 = MiniFloat<3, -6>;
using E2m1 = MiniFloat<1, 0>;

/// OCP e4m3 (torch.float8_e4m3fn): to nearest, ties to even; beyond 448, infinity included, +-448;
/// NaN of any sign is 0x7f. As cvt.rn.satfinite.e4m3x2 of PTX.
EPCOMM_HOST_DEVICE inline uint32_t e4m3_encode(float x) {
  const uint32_t magnitude = magnitude_bits(x), sign = (float_bits(x) >> 24) & 0x80;
  const uint32_t code = E4m3::encode(magnitude, 0x43e00000, 0x7e) | sign;
  return magnitude > kFloatInfinity ? kE4m3Nan : code;
}
EPCOMM_HOST_DEVICE inline float e4m3_decode(uint32_t code) {
  const uint32_t magnitude = code & 0x7f, sign = (code & 0x80) << 24;
  const uint32_t finite = E4m3::decode(magnitude);
  return bits_float((magnitude == kE4m3Nan ? kFloatNan : finite) | sign);
}

/// e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign (bit 3); to nearest, ties to the even code; beyond
/// 6, infinity included, +-6; NaN, which e2m1 lacks, is +6. As cvt.rn.satfinite.e2m1x2 of PTX.
EPCOMM_HOST_DEVICE inline uint32_t e2m1_encode(float x) {
  const uint32_t magnitude = magnitude_bits(x), sign = (float_bits(x) >> 28) & 0x8;
  const uint32_t code = E2m1::encode(magnitude, 0x40c00000, 7) | sign;
  return magnitude > kFloatInfinity ? 7 : code;
}
EPCOMM_HOST_DEVICE inline float e2m1_decode(uint32_t code) {
  return bits_float(E2m1::decode(code & 7) | (code & 8) << 28);
}
/// Two elements in a byte, the first in the low half: the order of torch.float4_e2m1fn_x2 and of
/// cvt.rn.satfinite.e2m1x2.f32, whose second source is the low half.
EPCOMM_HOST_DEVICE inline uint32_t e2m1_pair(float first, float second) {
  return e2m1_encode(first) | e2m1_encode(second) << 4;
}

/// 2^(code - 127); 255 is NaN (OCP MX 1.0, e8m0).
EPCOMM_HOST_DEVICE inline float ue8m0_decode(uint32_t code) {
  const uint32_t normal = code << 23, subnormal = 0x00400000;  // 2^-127
  return bits_float(code == kUe8m0Nan ? kFloatNan : code == 0 ? subnormal : normal);
}

// ---- groups ----

/// The scale of a group, as stored (code) and as the number that elements are multiplied with.
struct GroupScale {
  uint32_t code;  ///< kFp8: bits of the fp32; kFp8Ue8m0, kNvfp4: the byte
  float inverse;  ///< q = encode(x * inverse)
};

/// amax: the largest magnitude_bits of 128 elements.
EPCOMM_HOST_DEVICE inline GroupScale fp8_scale(uint32_t amax) {
  constexpr float kLeast = 0x1p-126f;
  const float scale = div_rn(bits_float(amax), kE4m3Max);
  const float safe = amax == 0 ? 1.0f : scale < kLeast ? kLeast : scale;
  const float inverse = div_rn(1.0f, safe);
  const uint32_t special = amax > kFloatInfinity ? kFloatNan : kFloatInfinity;
  const bool finite = amax < kFloatInfinity;
  return {finite ? float_bits(safe) : special, finite ? inverse : bits_float(kFloatNan)};
}

/// 448 is 1.75 * 2^8, so the exponent follows from the bits of amax without a division.
EPCOMM_HOST_DEVICE inline GroupScale fp8_ue8m0_scale(uint32_t amax) {
  const uint32_t exponent = (amax >> 23) + ((amax & 0x7fffff) > 0x600000 ? 1 : 0);
  const uint32_t least = exponent > 9 ? exponent - 8 : 1;
  const uint32_t code = amax == 0 ? kUe8m0One : least;
  const bool finite = amax < kFloatInfinity;
  return {finite ? code : kUe8m0Nan, bits_float(finite ? (254 - code) << 23 : kFloatNan)};
}

/// The global scale of a rank's rows and what group scales are made with. x = q * (scale * global).
struct GlobalScale {
  float global;
  float to_scale;  ///< 1 / (6 * global); NaN, which makes all scales NaN, where global is no scale
};
EPCOMM_HOST_DEVICE inline GlobalScale make_global_scale(float global) {
  const bool valid = global >= kMinGlobalScale && float_bits(global) < kFloatInfinity;
  const float inverse = div_rn(1.0f, mul_rn(kE2m1Max, valid ? global : 1.0f));
  return {global, valid ? inverse : bits_float(kFloatNan)};
}
/// From the largest magnitude of all finite elements: amax / (448 * 6), at least kMinGlobalScale; 1
/// where amax is 0.
EPCOMM_HOST_DEVICE inline float nvfp4_global_scale(uint32_t finite_amax) {
  const float global = div_rn(bits_float(finite_amax), kE4m3Max * kE2m1Max);
  if (finite_amax == 0) return 1.0f;
  return global < kMinGlobalScale ? kMinGlobalScale : global;
}

/// amax: the largest magnitude_bits of 16 elements. A scale that rounds to 0 makes the group 0.
EPCOMM_HOST_DEVICE inline GroupScale nvfp4_scale(uint32_t amax, const GlobalScale& global) {
  const bool finite = amax < kFloatInfinity;
  const uint32_t code = finite ? e4m3_encode(mul_rn(bits_float(amax), global.to_scale)) : kE4m3Nan;
  const float scale = mul_rn(e4m3_decode(code), global.global);
  const float inverse = div_rn(1.0f, code == 0 ? 1.0f : scale);
  const float special = code == 0 ? 0.0f : bits_float(kFloatNan);
  return {code, code == 0 || code == kE4m3Nan ? special : inverse};
}

// ---- rows: where the bytes are ----

EPCOMM_HOST_DEVICE inline QuantLayout make_quant_layout(Quant quant, int hidden) {
  const bool fp4 = quant == Quant::kNvfp4;
  QuantLayout layout{};
  layout.group = fp4 ? kNvfp4Group : kFp8Group;
  layout.multiple = fp4 ? 2 * kNvfp4Group : kFp8Group;
  layout.row_bytes = fp4 ? hidden / 2 : hidden;
  layout.num_groups = hidden / layout.group;
  layout.scale_bytes = fp4                         ? layout.num_groups
                       : quant == Quant::kFp8Ue8m0 ? (layout.num_groups + 3) / 4 * 4
                                                   : layout.num_groups * 4;
  layout.wire_scale_bytes = fp4 ? (layout.scale_bytes + 4 + 15) / 16 * 16 : layout.scale_bytes;
  return layout;
}

/// A row of kFp8 in one piece, as a quantised combine moves it: hidden codes, then the scales.
EPCOMM_HOST_DEVICE constexpr size_t fp8_row_bytes(int hidden) {
  return static_cast<size_t>(hidden) + static_cast<size_t>(hidden / kFp8Group) * sizeof(float);
}

/// Offset in bytes of the scale of (row, group): the fp32 of kFp8, the byte of the others.
EPCOMM_HOST_DEVICE inline int64_t linear_scale_offset(Quant quant, const ScaleStrides& strides,
                                                      int64_t row, int group) {
  const int unit = quant == Quant::kFp8Ue8m0 ? group / 4 : group;
  const int byte = quant == Quant::kFp8Ue8m0 ? group % 4 : 0;  // little-endian: group 0 is lowest
  return row * strides.row + unit * strides.unit + byte;
}
/// The same for one-byte scales in tiles of 128 rows and 4 groups, as block-scaled GEMMs read it
/// (cuBLAS, "1D Block Scaling Factors Layout"). Rows and groups are padded to whole tiles.
EPCOMM_HOST_DEVICE inline int64_t swizzled_scale_offset(int64_t row, int group, int num_groups) {
  const int64_t tile = row / 128 * ((num_groups + 3) / 4) + group / 4;
  return tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + group % 4;
}
/// Bytes of a swizzled array.
EPCOMM_HOST_DEVICE inline int64_t swizzled_scale_bytes(int64_t rows, int num_groups) {
  return (rows + 127) / 128 * ((num_groups + 3) / 4) * 512;
}
EPCOMM_HOST_DEVICE inline int64_t scale_offset(const QuantizeArgs& args, int num_groups,
                                               int64_t row, int group) {
  return args.scale_strides.swizzled
             ? swizzled_scale_offset(row, group, num_groups)
             : linear_scale_offset(args.quant, args.scale_strides, row, group);
}

}  // namespace epcomm
