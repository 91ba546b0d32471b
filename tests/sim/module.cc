// _sim: the GPU transports on simulated devices, for the Python tests. Never installed.
#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "bindings/buffer_bindings.h"
#include "bindings/layout_bindings.h"
#include "kernels/cuda_error.h"
#include "tests/sim/runtime.h"

PYBIND11_MODULE(_sim, m) {
  m.doc() = "epcomm's GPU transports on simulated devices.";
  epcomm::bind_buffer(m);
  epcomm::bind_dispatch_layout(m);
  m.def(
      "synchronize", [] { EPCOMM_CUDA_TRY(cudaDeviceSynchronize()); },
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Waits for all work; raises what kernels did wrong.");
  m.def(
      "issued",
      [] {
        const epcomm::sim::Issued issued = epcomm::sim::issued();
        return std::pair(issued.kernels, issued.copies);
      },
      "Kernels, and copies and fills, that this process has issued so far.");
  m.def("seed", [] { return epcomm::sim::options().seed; });
}
