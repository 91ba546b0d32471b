#include "core/host_rows.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace epcomm {
namespace {

// All conversions are branch-free selections, so that loops over them vectorise.

inline float bf16_to_float(uint16_t h) { return std::bit_cast<float>(uint32_t{h} << 16); }

inline uint16_t float_to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, sign = uint32_t{h & 0x8000u} << 16;
  // Moving the fields up leaves the exponent 112 too small, for normal and subnormal numbers alike.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = (magnitude << 13) | 0x7f800000;
  const uint32_t finite = std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>((magnitude >= 0x7c00 ? special : finite) | sign);
}

inline uint16_t float_to_half(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f), a = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
  const uint32_t normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  // Below 2^-14 the result counts units of 2^-24, the spacing of floats in [0.5, 1).
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000;
  uint32_t h = a < 0x38800000 ? subnormal : normal;
  h = a >= 0x477ff000 ? 0x7c00 : h;  // 65520 and above round to infinity
  h = a > 0x7f800000 ? 0x7e00 : h;
  return static_cast<uint16_t>(h | sign);
}

EPCOMM_VECTOR_CLONES void load_bf16(const uint16_t* row, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = bf16_to_float(row[i]);
}
EPCOMM_VECTOR_CLONES void load_half(const uint16_t* row, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = half_to_float(row[i]);
}
EPCOMM_VECTOR_CLONES void add_bf16(const uint16_t* row, float* sum, int n) {
  for (int i = 0; i < n; ++i) sum[i] += bf16_to_float(row[i]);
}
EPCOMM_VECTOR_CLONES void add_half(const uint16_t* row, float* sum, int n) {
  for (int i = 0; i < n; ++i) sum[i] += half_to_float(row[i]);
}
EPCOMM_VECTOR_CLONES void add_float(const float* row, float* sum, int n) {
  for (int i = 0; i < n; ++i) sum[i] += row[i];
}
EPCOMM_VECTOR_CLONES void add_weighted_bf16(const uint16_t* row, float w, float* sum, int n) {
  for (int i = 0; i < n; ++i) sum[i] += w * bf16_to_float(row[i]);
}
EPCOMM_VECTOR_CLONES void add_weighted_half(const uint16_t* row, float w, float* sum, int n) {
  for (int i = 0; i < n; ++i) sum[i] += w * half_to_float(row[i]);
}
EPCOMM_VECTOR_CLONES void add_weighted_float(const float* row, float w, float* sum, int n) {
  for (int i = 0; i < n; ++i) sum[i] += w * row[i];
}
EPCOMM_VECTOR_CLONES void round_bf16(const float* sum, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = float_to_bf16(sum[i]);
}
EPCOMM_VECTOR_CLONES void round_half(const float* sum, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = float_to_half(sum[i]);
}
EPCOMM_VECTOR_CLONES void copy_float(const float* sum, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = sum[i];
}

}  // namespace

void load_row(Dtype dtype, const void* row, float* out, int n) {
  if (dtype == Dtype::kBfloat16) return load_bf16(static_cast<const uint16_t*>(row), out, n);
  if (dtype == Dtype::kFloat16) return load_half(static_cast<const uint16_t*>(row), out, n);
  copy_float(static_cast<const float*>(row), out, n);
}

void add_row(Dtype dtype, const void* row, float* sum, int hidden) {
  if (dtype == Dtype::kBfloat16) return add_bf16(static_cast<const uint16_t*>(row), sum, hidden);
  if (dtype == Dtype::kFloat16) return add_half(static_cast<const uint16_t*>(row), sum, hidden);
  add_float(static_cast<const float*>(row), sum, hidden);
}

void add_weighted_row(Dtype dtype, const void* row, float weight, float* sum, int hidden) {
  if (dtype == Dtype::kBfloat16)
    return add_weighted_bf16(static_cast<const uint16_t*>(row), weight, sum, hidden);
  if (dtype == Dtype::kFloat16)
    return add_weighted_half(static_cast<const uint16_t*>(row), weight, sum, hidden);
  add_weighted_float(static_cast<const float*>(row), weight, sum, hidden);
}

void round_row(Dtype dtype, const float* sum, void* out, int hidden) {
  if (dtype == Dtype::kBfloat16) return round_bf16(sum, static_cast<uint16_t*>(out), hidden);
  if (dtype == Dtype::kFloat16) return round_half(sum, static_cast<uint16_t*>(out), hidden);
  copy_float(sum, static_cast<float*>(out), hidden);
}

void sum_terms(Dtype dtype, const std::vector<RowTerm>& terms, bool weighted, int begin, float* sum,
               int count) {
  const size_t offset = static_cast<size_t>(begin) * static_cast<size_t>(dtype_bytes(dtype));
  std::fill_n(sum, count, 0.0f);
  for (const RowTerm& term : terms) {
    const char* row = static_cast<const char*>(term.row) + offset;
    if (weighted)
      add_weighted_row(dtype, row, term.weight, sum, count);
    else
      add_row(dtype, row, sum, count);
  }
}

void sum_rows(Dtype dtype, const std::vector<RowTerm>& terms, bool weighted, void* out,
              int hidden) {
  constexpr int kBlock =
      1024;  // sums that stay in the first-level cache from the first row to the last
  const size_t element = static_cast<size_t>(dtype_bytes(dtype));
  float sum[kBlock];
  for (int begin = 0; begin < hidden; begin += kBlock) {
    const int count = std::min(kBlock, hidden - begin);
    sum_terms(dtype, terms, weighted, begin, sum, count);
    round_row(dtype, sum, static_cast<char*>(out) + static_cast<size_t>(begin) * element, count);
  }
}

}  // namespace epcomm
