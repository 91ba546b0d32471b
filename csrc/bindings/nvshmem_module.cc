// _nvshmem: the transports over NVSHMEM for Python. Needs libnvshmem_host.so.3 to be loaded already
// (python/epcomm/nvshmem.py sees to it); imports without a GPU.
#include "bindings/buffer_bindings.h"
#include "bindings/torch_pool.h"

PYBIND11_MODULE(_nvshmem, m) {
  m.doc() = "The transports of epcomm over NVSHMEM.";
  m.attr("version") = EPCOMM_VERSION;
  epcomm::bind_buffer(m);
  epcomm::bind_torch_pool(m);
}
