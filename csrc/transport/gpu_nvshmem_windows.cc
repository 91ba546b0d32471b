#include "transport/gpu_nvshmem_windows.h"

#include "core/vote.h"
#include "epcomm/error.h"

namespace epcomm {

LinkWindows nvshmem_windows(const std::shared_ptr<NvshmemWindow>& window, const Bootstrap& group) {
  LinkWindows windows;
  windows.window[group.rank()] = window->own();
  for (int r = 0; r < group.size(); ++r) windows.pe[r] = window->pe(r);
  windows.owner = window;
  return windows;
}

void check_mapped(Bootstrap& group, const NvshmemWindow& window, const std::string& transport) {
  const auto failures = failures_of(group, [&] {
    for (int r = 0; r < group.size(); ++r)
      if (!window.mapped(r)) throw Error("rank " + std::to_string(r) + " is over a network");
  });
  throw_failures("making a Buffer of transport " + transport, failures,
                 "NVSHMEM's network path has failed a test of this transport (docs/rdma.md): use "
                 "transport='nccl', or transport_options={'network': 'unproven'} to try it");
}

}  // namespace epcomm
