#pragma once

#include <pybind11/pybind11.h>

#include "epcomm/quant.h"

namespace epcomm {

/// The functions of epcomm/quant.h that one module offers: on the host or on the GPU.
struct QuantFunctions {
  void (*quantize)(const QuantizeArgs&);
  void (*dequantize)(const QuantizeArgs&);
  void (*global_scale)(Dtype dtype, const void* x, int64_t count, float* out, void* stream);
};

/// Binds them; bind_buffer() comes first.
void bind_quant(pybind11::module_& m, const QuantFunctions& functions);

}  // namespace epcomm
