// Symmetric memory of ranks between which only a simulated network card goes: nobody is given the
// address of another rank's. Which of them it says are mapped is an option.
#include "transport/gpu_nvshmem.h"

#include <cuda_runtime_api.h>

#include <vector>

#include "epcomm/window.h"
#include "tests/sim/nic.h"
#include "tests/sim/runtime.h"

namespace epcomm {
namespace {

class SimWindow final : public NvshmemWindow {
 public:
  SimWindow(Bootstrap& bootstrap, size_t bytes)
      : num_pes_(bootstrap.size()),
        rank_(bootstrap.rank()),
        window_(make_host_window(bootstrap, bytes, 60)),
        nic_(windows(), pe(rank_), sim::options().seed * 64 + static_cast<uint64_t>(rank_)) {}
  char* own() const override { return window_->peer(rank_); }
  // Not the rank, so that nobody takes the one for the other.
  int pe(int rank) const override { return num_pes_ - 1 - rank; }
  bool mapped(int rank) const override { return sim::options().mapped(rank_, rank); }
  void abandon() override {}

 private:
  std::vector<char*> windows() const {
    std::vector<char*> by_pe(static_cast<size_t>(num_pes_));
    for (int r = 0; r < num_pes_; ++r) by_pe[static_cast<size_t>(pe(r))] = window_->peer(r);
    return by_pe;
  }

  int num_pes_, rank_;
  std::unique_ptr<Window> window_;
  sim::Nic nic_;
};

}  // namespace

std::shared_ptr<NvshmemWindow> make_nvshmem_window(Bootstrap& bootstrap, size_t bytes, size_t) {
  return std::make_shared<SimWindow>(bootstrap, bytes);
}

}  // namespace epcomm
