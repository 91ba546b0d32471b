// Quantised rows in host memory, one at a time; the formats are those of kernels/quant.h.
#pragma once

#include <cstddef>
#include <vector>

#include "core/host_rows.h"
#include "epcomm/quant.h"
#include "epcomm/types.h"
#include "kernels/quant.h"

namespace epcomm {

/// A kind of row and its quantised form.
struct RowFormat {
  Quant quant = Quant::kNone;
  Dtype dtype = Dtype::kUnset;  ///< of the row that is not quantised
  int hidden = 0;
  float global_scale = 1.0f;  ///< kNvfp4
};

/// Writes QuantLayout::row_bytes of q and scale_bytes of scales.
void quantize_row(const RowFormat& format, const void* x, void* q, void* scales);
/// As quantize_row, with scales as a dispatch moves them: wire_scale_bytes.
void quantize_wire_row(const RowFormat& format, const void* x, void* q, void* scales);
void dequantize_row(const RowFormat& format, const void* q, const void* scales, void* x);

/// out = the terms' rows (times their weights, if weighted), added in order in fp32, as one row of
/// fp8_row_bytes.
void sum_to_fp8_row(Dtype dtype, const std::vector<RowTerm>& terms, bool weighted, int hidden,
                    void* out);
/// out = rows of fp8_row_bytes, each product with its scale rounded to fp32, added in order in
/// fp32, then + bias (may be null), rounded once to dtype.
void sum_fp8_rows(Dtype dtype, const std::vector<const char*>& rows, const void* bias, void* out,
                  int hidden);

}  // namespace epcomm
