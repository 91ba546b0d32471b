#include "core/quant_rows.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core/host_rows.h"
#include "epcomm/error.h"
#include "kernels/quant.h"

namespace epcomm {
namespace {

constexpr int kBlock = 1024;  // elements in fp32 at a time, whole groups of every format
constexpr int kPart = 16;     // elements that share a factor in any format; groups are whole parts
constexpr int kParts = kBlock / kPart;

// Each loop below is one vector loop; the scalar functions are selections without branches.

// amax[p]: the largest magnitude_bits of part p.
EPCOMM_VECTOR_CLONES void max_magnitudes(const float* x, uint32_t* amax, int parts) {
  for (int p = 0; p < parts; ++p) {
    uint32_t most = 0;
    for (int i = 0; i < kPart; ++i) most = std::max(most, magnitude_bits(x[p * kPart + i]));
    amax[p] = most;
  }
}
EPCOMM_VECTOR_CLONES uint32_t max_finite_magnitude(const float* x, int n) {
  uint32_t amax = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t m = magnitude_bits(x[i]);
    const uint32_t finite = m & (0u - static_cast<uint32_t>(m < kFloatInfinity));
    amax = std::max(amax, finite);
  }
  return amax;
}
EPCOMM_VECTOR_CLONES void multiply(float* x, const float* factor, int parts) {
  for (int p = 0; p < parts; ++p)
    for (int i = 0; i < kPart; ++i) x[p * kPart + i] *= factor[p];
}
EPCOMM_VECTOR_CLONES void encode_e4m3(const float* x, uint8_t* q, int n) {
  for (int i = 0; i < n; ++i) q[i] = static_cast<uint8_t>(e4m3_encode(x[i]));
}
EPCOMM_VECTOR_CLONES void encode_e2m1(const float* x, uint8_t* q, int n) {
  for (int i = 0; i < n / 2; ++i) q[i] = static_cast<uint8_t>(e2m1_pair(x[2 * i], x[2 * i + 1]));
}
EPCOMM_VECTOR_CLONES void decode_e4m3(const uint8_t* q, float* x, int n) {
  for (int i = 0; i < n; ++i) x[i] = e4m3_decode(q[i]);
}
EPCOMM_VECTOR_CLONES void decode_e2m1(const uint8_t* q, float* x, int n) {
  for (int i = 0; i < n / 2; ++i) {
    x[2 * i] = e2m1_decode(q[i] & 15u);
    x[2 * i + 1] = e2m1_decode(q[i] >> 4u);
  }
}

void store_scale(Quant quant, uint32_t code, uint8_t* scales, int group) {
  if (quant == Quant::kFp8)
    std::memcpy(scales + 4 * group, &code, sizeof code);
  else
    scales[group] = static_cast<uint8_t>(code);
}

// What the elements of a group are multiplied with to turn them back.
float load_scale(const RowFormat& format, const uint8_t* scales, int group) {
  if (format.quant == Quant::kFp8) {
    float scale;
    std::memcpy(&scale, scales + 4 * group, sizeof scale);
    return scale;
  }
  return format.quant == Quant::kNvfp4 ? e4m3_decode(scales[group]) * format.global_scale
                                       : ue8m0_decode(scales[group]);
}

GroupScale group_scale(Quant quant, uint32_t amax, const GlobalScale& global) {
  if (quant == Quant::kNvfp4) return nvfp4_scale(amax, global);
  return quant == Quant::kFp8 ? fp8_scale(amax) : fp8_ue8m0_scale(amax);
}

}  // namespace

void quantize_row(const RowFormat& format, const void* x, void* q, void* scales) {
  const QuantLayout layout = make_quant_layout(format.quant, format.hidden);
  const GlobalScale global = make_global_scale(format.global_scale);
  uint8_t* codes = static_cast<uint8_t*>(q);
  uint8_t* codes_of_scales = static_cast<uint8_t*>(scales);
  float block[kBlock], inverse[kParts];
  uint32_t amax[kParts];
  const int parts_of_group = layout.group / kPart;
  int group = 0;
  for (int begin = 0; begin < format.hidden; begin += kBlock) {
    const int count = std::min(kBlock, format.hidden - begin), parts = count / kPart;
    load_row(format.dtype, static_cast<const char*>(x) + int64_t{begin} * dtype_bytes(format.dtype),
             block, count);
    max_magnitudes(block, amax, parts);
    for (int p = 0; p < parts; p += parts_of_group, ++group) {
      const uint32_t most = *std::max_element(amax + p, amax + p + parts_of_group);
      const GroupScale scale = group_scale(format.quant, most, global);
      store_scale(format.quant, scale.code, codes_of_scales, group);
      std::fill_n(inverse + p, parts_of_group, scale.inverse);
    }
    multiply(block, inverse, parts);
    if (format.quant == Quant::kNvfp4)
      encode_e2m1(block, codes + begin / 2, count);
    else
      encode_e4m3(block, codes + begin, count);
  }
  if (format.quant != Quant::kFp8)
    std::fill(codes_of_scales + group, codes_of_scales + layout.scale_bytes, uint8_t{0});
}

void quantize_wire_row(const RowFormat& format, const void* x, void* q, void* scales) {
  const QuantLayout layout = make_quant_layout(format.quant, format.hidden);
  quantize_row(format, x, q, scales);
  if (layout.wire_scale_bytes == layout.scale_bytes) return;
  char* end = static_cast<char*>(scales) + layout.wire_scale_bytes;
  std::fill(static_cast<char*>(scales) + layout.scale_bytes, end, char{0});
  std::memcpy(end - sizeof(float), &format.global_scale, sizeof(float));
}

namespace {

// count elements from begin on, turned back to fp32.
void dequantize_block(const RowFormat& format, const void* q, const void* scales, int begin,
                      float* out, int count) {
  const int group_size = make_quant_layout(format.quant, format.hidden).group;
  const uint8_t* codes = static_cast<const uint8_t*>(q);
  float factor[kParts];
  for (int p = 0; p < count / kPart; p += group_size / kPart)
    std::fill_n(
        factor + p, group_size / kPart,
        load_scale(format, static_cast<const uint8_t*>(scales), (begin + p * kPart) / group_size));
  if (format.quant == Quant::kNvfp4)
    decode_e2m1(codes + begin / 2, out, count);
  else
    decode_e4m3(codes + begin, out, count);
  multiply(out, factor, count / kPart);
}

}  // namespace

void dequantize_row(const RowFormat& format, const void* q, const void* scales, void* x) {
  float block[kBlock];
  for (int begin = 0; begin < format.hidden; begin += kBlock) {
    const int count = std::min(kBlock, format.hidden - begin);
    dequantize_block(format, q, scales, begin, block, count);
    round_row(format.dtype, block,
              static_cast<char*>(x) + int64_t{begin} * dtype_bytes(format.dtype), count);
  }
}

void sum_to_fp8_row(Dtype dtype, const std::vector<RowTerm>& terms, bool weighted, int hidden,
                    void* out) {
  char* q = static_cast<char*>(out);
  float sum[kBlock];
  for (int begin = 0; begin < hidden; begin += kBlock) {
    const int count = std::min(kBlock, hidden - begin);
    sum_terms(dtype, terms, weighted, begin, sum, count);
    quantize_row({Quant::kFp8, Dtype::kFloat32, count}, sum, q + begin,
                 q + hidden + begin / kFp8Group * 4);
  }
}

void sum_fp8_rows(Dtype dtype, const std::vector<const char*>& rows, const void* bias, void* out,
                  int hidden) {
  const RowFormat format{Quant::kFp8, dtype, hidden};
  float sum[kBlock], block[kBlock];
  for (int begin = 0; begin < hidden; begin += kBlock) {
    const int count = std::min(kBlock, hidden - begin);
    const int64_t at = int64_t{begin} * dtype_bytes(dtype);
    std::fill_n(sum, count, 0.0f);
    for (const char* row : rows) {
      dequantize_block(format, row, row + hidden, begin, block, count);
      add_row(Dtype::kFloat32, block, sum, count);
    }
    if (bias != nullptr) add_row(dtype, static_cast<const char*>(bias) + at, sum, count);
    round_row(dtype, sum, static_cast<char*>(out) + at, count);
  }
}

QuantLayout quant_layout(Quant quant, int hidden) {
  EPCOMM_CHECK(
      quant == Quant::kFp8 || quant == Quant::kFp8Ue8m0 || quant == Quant::kNvfp4,
      "quant is " + std::to_string(static_cast<int>(quant)) + "; expected fp8, fp8_ue8m0 or nvfp4");
  const QuantLayout layout = make_quant_layout(quant, hidden);
  EPCOMM_CHECK(hidden > 0 && hidden % layout.multiple == 0,
               "hidden is " + std::to_string(hidden) + "; this quantisation takes multiples of " +
                   std::to_string(layout.multiple) + ": pad hidden");
  return layout;
}

void check_quantize_args(const QuantizeArgs& args) {
  const QuantLayout layout = quant_layout(args.quant, args.hidden);
  EPCOMM_CHECK(args.dtype == Dtype::kBfloat16 || args.dtype == Dtype::kFloat16 ||
                   args.dtype == Dtype::kFloat32,
               "dtype of the rows must be bfloat16, float16 or float32");
  EPCOMM_CHECK(args.num_rows >= 0,
               "num_rows is " + std::to_string(args.num_rows) + "; expected at least 0");
  EPCOMM_CHECK(
      args.num_rows == 0 || (args.x != nullptr && args.q != nullptr && args.scales != nullptr &&
                             (args.global_scale != nullptr || args.quant != Quant::kNvfp4)),
      "x, q, scales and, for nvfp4, global_scale must all be given");
  EPCOMM_CHECK(!args.scale_strides.swizzled || args.quant == Quant::kNvfp4,
               "swizzled scales are offered for nvfp4 only");
  EPCOMM_CHECK(!args.wire || (!args.scale_strides.swizzled &&
                              args.scale_strides.row >= layout.wire_scale_bytes),
               "rows of scales as a dispatch moves them need " +
                   std::to_string(layout.wire_scale_bytes) + " bytes each");
}

namespace {

// The scales of one row, between their place and a contiguous copy.
template <bool kStore>
void move_scales(const QuantizeArgs& args, const QuantLayout& layout, int64_t row, uint8_t* copy) {
  const int64_t size = args.quant == Quant::kFp8 ? 4 : 1;
  // The bytes that pad the last int32 of kFp8Ue8m0 belong to the row.
  const int count = args.quant == Quant::kFp8Ue8m0 ? layout.scale_bytes : layout.num_groups;
  for (int g = 0; g < count; ++g) {
    uint8_t* there =
        static_cast<uint8_t*>(args.scales) + scale_offset(args, layout.num_groups, row, g);
    std::memcpy(kStore ? there : copy + g * size, kStore ? copy + g * size : there,
                static_cast<size_t>(size));
  }
}

}  // namespace

void quantize(const QuantizeArgs& args) {
  check_quantize_args(args);
  const QuantLayout layout = make_quant_layout(args.quant, args.hidden);
  RowFormat format{args.quant, args.dtype, args.hidden};
  if (args.quant == Quant::kNvfp4 && args.num_rows > 0) format.global_scale = *args.global_scale;
  std::vector<uint8_t> scales(static_cast<size_t>(layout.wire_scale_bytes));
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const char* x = static_cast<const char*>(args.x) + r * args.hidden * dtype_bytes(args.dtype);
    char* q = static_cast<char*>(args.q) + r * layout.row_bytes;
    if (args.wire) {
      quantize_wire_row(format, x, q, static_cast<char*>(args.scales) + r * args.scale_strides.row);
      continue;
    }
    quantize_row(format, x, q, scales.data());
    move_scales<true>(args, layout, r, scales.data());
  }
}

void dequantize(const QuantizeArgs& args) {
  check_quantize_args(args);
  const QuantLayout layout = make_quant_layout(args.quant, args.hidden);
  RowFormat format{args.quant, args.dtype, args.hidden};
  std::vector<uint8_t> scales(static_cast<size_t>(layout.scale_bytes));
  for (int64_t r = 0; r < args.num_rows; ++r) {
    if (args.quant == Quant::kNvfp4)
      format.global_scale = args.global_scale[r * args.global_stride];
    move_scales<false>(args, layout, r, scales.data());
    dequantize_row(format, static_cast<const char*>(args.q) + r * layout.row_bytes, scales.data(),
                   static_cast<char*>(args.x) + r * args.hidden * dtype_bytes(args.dtype));
  }
}

void global_scale(Dtype dtype, const void* x, int64_t count, float* out) {
  uint32_t amax = 0;
  float block[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, count - begin));
    load_row(dtype, static_cast<const char*>(x) + begin * dtype_bytes(dtype), block, n);
    amax = std::max(amax, max_finite_magnitude(block, n));
  }
  *out = nvfp4_global_scale(amax);
}

}  // namespace epcomm
