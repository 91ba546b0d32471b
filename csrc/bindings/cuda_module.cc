// _cuda: the GPU transports for Python. Imports without a GPU and without libcuda.
#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings/buffer_bindings.h"
#include "bindings/layout_bindings.h"
#include "bindings/py_bootstrap.h"
#include "bindings/quant_bindings.h"
#include "bindings/torch_pool.h"
#include "epcomm/peer_access.h"
#include "epcomm/small_batches.h"
#include "epcomm/symmetric_memory.h"

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

namespace py = pybind11;

void bind_peer_access(py::module_& m) {
  using epcomm::BadPair;
  using epcomm::PeerAccess;
  py::class_<BadPair>(m, "BadPair", py::module_local())
      .def_readonly("from_rank", &BadPair::from)
      .def_readonly("to_rank", &BadPair::to)
      .def_readonly("reason", &BadPair::reason);
  py::class_<PeerAccess>(m, "PeerAccess", py::module_local())
      .def_readonly("bad_pairs", &PeerAccess::bad_pairs)
      .def_readonly("failure", &PeerAccess::failure)
      .def_property_readonly("good", &PeerAccess::good)
      .def_property_readonly("text", &PeerAccess::text);
  m.def(
      "check_peer_access",
      [](py::object bootstrap, double timeout_s, bool share_gpu) {
        auto wrapped = std::make_unique<epcomm::PyBootstrap>(std::move(bootstrap));
        py::gil_scoped_release release;
        return epcomm::check_peer_access(*wrapped, timeout_s, share_gpu);
      },
      py::arg("bootstrap"), py::arg("timeout"), py::arg("share_gpu") = false);
  m.def(
      "check_peer_access_in_nodes",
      [](py::object bootstrap, double timeout_s, int ranks_per_node) {
        auto wrapped = std::make_unique<epcomm::PyBootstrap>(std::move(bootstrap));
        py::gil_scoped_release release;
        return epcomm::check_peer_access_in_nodes(*wrapped, timeout_s, ranks_per_node);
      },
      py::arg("bootstrap"), py::arg("timeout"), py::arg("ranks_per_node"));
  m.def("why_not_small_batches", &epcomm::why_not_small_batches, py::arg("num_ranks"),
        py::arg("num_experts"), py::arg("max_tokens"));
}

// See python/epcomm/symmetric.py.
void bind_symmetric_memory(py::module_& m) {
  using epcomm::SymmetricMemory;
  py::class_<SymmetricMemory>(m, "SymmetricMemory", py::module_local())
      .def(py::init([](py::object bootstrap, size_t bytes, double timeout_s) {
             auto wrapped = std::make_unique<epcomm::PyBootstrap>(std::move(bootstrap));
             py::gil_scoped_release release;
             return std::make_unique<SymmetricMemory>(*wrapped, bytes, timeout_s);
           }),
           py::arg("bootstrap"), py::arg("bytes"), py::arg("timeout"))
      .def_property_readonly("bytes", &SymmetricMemory::bytes)
      .def_property_readonly("share", &SymmetricMemory::share)
      .def_property_readonly("free_bytes", &SymmetricMemory::free_bytes)
      .def("peer", [](const SymmetricMemory& s,
                      int rank) { return reinterpret_cast<uintptr_t>(s.peer(rank)); })
      .def("alive", &SymmetricMemory::alive)
      .def("allocate", [](SymmetricMemory& s, size_t bytes) -> std::optional<epcomm::Allocation> {
        epcomm::Allocation piece = s.allocate(bytes);
        if (piece.data == nullptr) return std::nullopt;
        return piece;
      });
  m.def("set_pool_source", [](SymmetricMemory& source) {
    epcomm::set_pool_source([&source](size_t bytes) { return source.allocate(bytes); });
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The GPU transports of epcomm.";
  m.attr("version") = EPCOMM_VERSION;
  m.attr("cuda_version") = CUDART_VERSION;
  m.attr("archs") = EPCOMM_CUDA_ARCH_LIST;
  m.def("device_status", &device_status);
  epcomm::bind_buffer(m);
  epcomm::bind_torch_pool(m);
  epcomm::bind_quant(
      m, {&epcomm::quantize_cuda, &epcomm::dequantize_cuda, &epcomm::global_scale_cuda});
  epcomm::bind_dispatch_layout(m);
  bind_peer_access(m);
  bind_symmetric_memory(m);
}
