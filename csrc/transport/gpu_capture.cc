#include <cuda_runtime_api.h>

#include <mutex>
#include <utility>
#include <vector>

#include "epcomm/graph.h"
#include "kernels/cuda_error.h"

namespace epcomm {
namespace {

using Owner = std::shared_ptr<void>;

// Never destroyed: the driver may end a graph while the process exits.
struct Released {
  std::mutex mutex;
  std::vector<Owner> owners;
};
Released& released() {
  static Released& all = *new Released;
  return all;
}

// Host code that the driver runs when the last graph that holds an owner is gone.
void CUDART_CB end_of_graph(void* held) {
  auto* owner = static_cast<Owner*>(held);
  {
    std::lock_guard lock(released().mutex);
    released().owners.push_back(std::move(*owner));
  }
  delete owner;
}

cudaGraph_t captured_graph(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  EPCOMM_CUDA_TRY(
      cudaStreamGetCaptureInfo(stream, &status, &id, &graph, nullptr, nullptr, nullptr));
#else
  EPCOMM_CUDA_TRY(cudaStreamGetCaptureInfo_v2(stream, &status, &id, &graph, nullptr, nullptr));
#endif
  return status == cudaStreamCaptureStatusActive ? graph : nullptr;
}

}  // namespace

void release_uncaptured() {
  std::vector<Owner> owners;  // ended after the lock: an owner may unmap a whole window
  std::lock_guard lock(released().mutex);
  owners.swap(released().owners);
}

bool retain_in_capture(void* stream, std::shared_ptr<void> owner) {
  release_uncaptured();
  cudaGraph_t graph = captured_graph(static_cast<cudaStream_t>(stream));
  if (graph == nullptr) return false;
  auto held = std::make_unique<Owner>(std::move(owner));
  cudaUserObject_t object = nullptr;
  EPCOMM_CUDA_TRY(
      cudaUserObjectCreate(&object, held.get(), &end_of_graph, 1, cudaUserObjectNoDestructorSync));
  held.release();  // the object's now
  if (const cudaError_t code = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
      code != cudaSuccess) {
    cudaUserObjectRelease(object, 1);
    check_cuda(code, "cudaGraphRetainUserObject");
  }
  return true;
}

}  // namespace epcomm
