// The GPU window of ranks that share a simulated NVLink domain: memory of the host is memory of
// every device here.
#include "transport/gpu_window.h"

#include <cuda_runtime_api.h>

#include <utility>

namespace epcomm {
namespace {

class SimWindow final : public GpuWindow {
 public:
  explicit SimWindow(std::unique_ptr<Window> window) : window_(std::move(window)) {
    cudaGetDevice(&device_);
  }
  size_t bytes() const override { return window_->bytes(); }
  char* peer(int rank) const override { return window_->peer(rank); }
  std::shared_ptr<char> own() const override { return window_->own(); }
  bool alive(int rank) const override { return window_->alive(rank); }
  int device() const override { return device_; }
  WindowShare share() const override { return WindowShare::kDescriptor; }

 private:
  std::unique_ptr<Window> window_;
  int device_ = 0;
};

}  // namespace

std::unique_ptr<GpuWindow> make_gpu_window(Bootstrap& bootstrap, size_t bytes, double timeout_s) {
  return std::make_unique<SimWindow>(make_host_window(bootstrap, bytes, timeout_s));
}

}  // namespace epcomm
