// Arithmetic on token rows in host memory: conversions to and from fp32, sums. Each operation is
// rounded to fp32 on its own (no fused multiply-add), so that every transport can give the same
// bits.
#pragma once

#include <vector>

#include "epcomm/types.h"

// Compiled twice on x86, and the better chosen when the library is loaded. Sanitizers do not get
// along with that choice (it runs before they are ready).
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define EPCOMM_VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define EPCOMM_VECTOR_CLONES
#endif

namespace epcomm {

/// out[i] = row[i], exactly, for n elements of dtype (bf16, fp16 or fp32).
void load_row(Dtype dtype, const void* row, float* out, int n);
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
/// sum[i] = the terms' elements begin + i (times their weights, if weighted), added in order.
void sum_terms(Dtype dtype, const std::vector<RowTerm>& terms, bool weighted, int begin, float* sum,
               int count);
/// out = the terms' rows (times their weights, if weighted), added in order in fp32, rounded once.
void sum_rows(Dtype dtype, const std::vector<RowTerm>& terms, bool weighted, void* out, int hidden);

}  // namespace epcomm
