#include "bindings/torch_pool.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

#include "epcomm/graph.h"

namespace epcomm {
namespace {

thread_local std::function<Allocation(size_t)> pool_source;

// Never destroyed: torch gives segments back while the process exits, too.
struct Segments {
  std::mutex mutex;
  std::map<void*, Allocation> held;
};
Segments& segments() {
  static Segments& all = *new Segments;
  return all;
}

}  // namespace

void set_pool_source(std::function<Allocation(size_t)> allocate) {
  pool_source = std::move(allocate);
}

void bind_torch_pool(pybind11::module_& m) {
  m.def("set_pool_source", [](Buffer& source) {
    set_pool_source([&source](size_t bytes) { return source.allocate(bytes); });
  });
  m.def("set_pool_source", [](const pybind11::none&) { set_pool_source(nullptr); });
  m.def("retain_in_capture", [](const Allocation& piece, uintptr_t stream) {
    return retain_in_capture(reinterpret_cast<void*>(stream), piece.owner);
  });
  m.def("release_uncaptured", &release_uncaptured,
        pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace epcomm

#define EPCOMM_EXPORT extern "C" __attribute__((visibility("default")))

// Null makes torch raise OutOfMemoryError; an exception must not leave here.
EPCOMM_EXPORT void* epcomm_pool_alloc(size_t bytes, int, cudaStream_t) noexcept {
  using namespace epcomm;
  if (!pool_source) return nullptr;
  try {
    Allocation segment = pool_source(bytes);
    void* address = segment.data;
    if (address == nullptr) return nullptr;
    std::lock_guard lock(segments().mutex);
    segments().held[address] = std::move(segment);
    return address;
  } catch (...) {
    return nullptr;
  }
}

// As cudaFree does, and as torch expects of whoever frees a segment: waits for the GPU, whose queue
// may hold work on it. Segments are given back rarely: when the window is full, and at the end.
EPCOMM_EXPORT void epcomm_pool_free(void* address, size_t, int device, cudaStream_t) noexcept {
  using namespace epcomm;
  int current = device;
  cudaGetDevice(&current);
  cudaSetDevice(device);
  cudaDeviceSynchronize();
  cudaSetDevice(current);
  try {
    Allocation segment;  // ended after the lock: it may unmap the window
    std::lock_guard lock(segments().mutex);
    if (auto node = segments().held.extract(address)) segment = std::move(node.mapped());
  } catch (...) {  // a mutex that fails: the segment stays
  }
}
