// Arithmetic on token rows in host memory: conversions to and from fp32, sums. Each operation is
// rounded to fp32 on its own (no fused multiply-add), so that every transport can give the same
// bits.
#pragma once

#include <vector>

#include "epcomm/types.h"

namespace epcomm {

/// sum[i] += row[i], for hidden elements of dtype (bf16, fp16 or fp32).
void add_row(Dtype dtype, const void* row, float* sum, int hidden);
/// sum[i] += weight * row[i]; the product is rounded to fp32 first.
void add_weighted_row(Dtype dtype, const void* row, float weight, float* sum, int hidden);
/// out[i] = sum[i] rounded to dtype, to nearest, ties to even; NaN stays NaN.
void round_row(Dtype dtype, const float* sum, void* out, int hidden);

/// One summand of sum_rows.
struct RowTerm {
  const void* row;
  float weight;
};
/// out = the terms' rows (times their weights, if weighted), added in order in fp32, rounded once.
void sum_rows(Dtype dtype, const std::vector<RowTerm>& terms, bool weighted, void* out, int hidden);

}  // namespace epcomm
