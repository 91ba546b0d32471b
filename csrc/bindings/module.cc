// _core: the CPU part of epcomm for Python. Pointers and plain structs in, exceptions out.
#include "bindings/buffer_bindings.h"
#include "bindings/quant_bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "epcomm without CUDA: the core and the cpu transport.";
  m.attr("version") = EPCOMM_VERSION;
  m.attr("cuda_status") = EPCOMM_CUDA_STATUS;
  m.attr("nvshmem_status") = EPCOMM_NVSHMEM_STATUS;
  epcomm::bind_buffer(m);
  epcomm::bind_quant(m, {&epcomm::quantize, &epcomm::dequantize,
                         [](epcomm::Dtype dtype, const void* x, int64_t count, float* out, void*) {
                           epcomm::global_scale(dtype, x, count, out);
                         }});
}
