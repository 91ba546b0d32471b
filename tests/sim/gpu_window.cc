// The GPU window of ranks that share a simulated NVLink domain: memory of the host is memory of
// every device here. Which devices say that they address each other is an option.
#include "transport/gpu_window.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "epcomm/peer_access.h"
#include "tests/sim/runtime.h"

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

std::string PeerAccess::text() const {
  std::string text = failure;
  for (const BadPair& pair : bad_pairs)
    text += "rank " + std::to_string(pair.from) + " -> rank " + std::to_string(pair.to);
  return text;
}

PeerAccess check_peer_access(Bootstrap& bootstrap, double, bool) {
  int mine = 0;
  cudaGetDevice(&mine);
  std::vector<int> devices(static_cast<size_t>(bootstrap.size()));
  bootstrap.all_gather(&mine, devices.data(), sizeof mine);
  const auto& bad = sim::options().no_peer_access;
  PeerAccess access;
  for (size_t from = 0; from < devices.size(); ++from)
    for (size_t to = 0; to < devices.size(); ++to)
      if (std::find(bad.begin(), bad.end(), std::pair(devices[from], devices[to])) != bad.end())
        access.bad_pairs.push_back({static_cast<int>(from), static_cast<int>(to), "simulated"});
  return access;
}

}  // namespace epcomm
