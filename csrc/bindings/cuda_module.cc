// _cuda: the GPU transports for Python. Imports without a GPU and without libcuda.
#include <cuda_runtime_api.h>

#include <string>

#include "bindings/buffer_bindings.h"

namespace {

// What the runtime says of the current device, and whether this build has code for it.
pybind11::dict device_status() {
  pybind11::dict status;
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  status["count"] = found == cudaSuccess ? count : 0;
  status["reason"] = found == cudaSuccess ? "" : cudaGetErrorString(found);
  if (found != cudaSuccess) {
    cudaGetLastError();
    return status;
  }
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  status["capability"] = std::to_string(major) + "." + std::to_string(minor);
  return status;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The GPU transports of epcomm.";
  m.attr("version") = EPCOMM_VERSION;
  m.attr("cuda_version") = CUDART_VERSION;
  m.attr("archs") = EPCOMM_CUDA_ARCH_LIST;
  m.def("device_status", &device_status);
  epcomm::bind_buffer(m);
}
