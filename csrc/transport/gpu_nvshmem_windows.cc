#include "transport/gpu_nvshmem_windows.h"

namespace epcomm {

LinkWindows nvshmem_windows(const std::shared_ptr<NvshmemWindow>& window, const Bootstrap& group) {
  LinkWindows windows;
  windows.window[group.rank()] = window->own();
  for (int r = 0; r < group.size(); ++r) {
    windows.pe[r] = window->pe(r);
    // There the warp that puts copies itself, one vector a lane after the other.
    if (r != group.rank() && window->mapped(r)) windows.cut_for |= uint32_t{1} << r;
  }
  windows.owner = window;
  return windows;
}

}  // namespace epcomm
