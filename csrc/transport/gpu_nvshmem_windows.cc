#include "transport/gpu_nvshmem_windows.h"

namespace epcomm {

LinkWindows nvshmem_windows(const std::shared_ptr<NvshmemWindow>& window, const Bootstrap& group) {
  LinkWindows windows;
  windows.window[group.rank()] = window->own();
  for (int r = 0; r < group.size(); ++r) windows.pe[r] = window->pe(r);
  windows.owner = window;
  return windows;
}

}  // namespace epcomm
