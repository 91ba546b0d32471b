// Quantises rows and turns them back, without a Buffer. Formats and formulas: csrc/kernels/quant.h;
// docs/quantisation.md says them in words.
#pragma once

#include <cstdint>

#include "epcomm/types.h"

namespace epcomm {

/// Sizes of a quantised row of hidden elements. Throws InvalidArgument unless hidden is a positive
/// multiple of QuantLayout::multiple.
QuantLayout quant_layout(Quant quant, int hidden);

/// Throws InvalidArgument unless args can be worked on.
void check_quantize_args(const QuantizeArgs& args);

/// x to q and scales, in host memory. Rounds to nearest, ties to even. Throws InvalidArgument.
void quantize(const QuantizeArgs& args);
/// q and scales to x = q * scale in fp32, rounded once to dtype. Throws InvalidArgument.
void dequantize(const QuantizeArgs& args);
/// *out = (largest finite magnitude of count elements of x) / (448 * 6), the global scale of kNvfp4
/// that uses its whole range; 1 if they are all 0.
void global_scale(Dtype dtype, const void* x, int64_t count, float* out);

/// The same on the current GPU, on args.stream; they return at once. Addresses must be multiples
/// of 16, global_scale on the GPU. Only in builds with CUDA.
void quantize_cuda(const QuantizeArgs& args);
void dequantize_cuda(const QuantizeArgs& args);
void global_scale_cuda(Dtype dtype, const void* x, int64_t count, float* out, void* stream);

}  // namespace epcomm
