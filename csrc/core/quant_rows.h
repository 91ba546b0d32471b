// Quantised rows in host memory, one at a time; the formats are those of kernels/quant.h.
#pragma once

#include "epcomm/quant.h"
#include "epcomm/types.h"

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
/// sum[i] += q[i] * scale in fp32, for a row of kFp8; the product is rounded first.
void add_fp8_row(const void* q, const void* scales, float* sum, int hidden);

}  // namespace epcomm
