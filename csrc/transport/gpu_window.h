// Windows in device memory, which peers' kernels load and store directly.
#pragma once

#include <cstddef>
#include <memory>

#include "epcomm/bootstrap.h"
#include "epcomm/window.h"

namespace epcomm {

/// How the ranks of a GpuWindow got at each other's memory. One way for all pairs.
enum class WindowShare {
  kDescriptor,  ///< VMM memory, passed as file descriptors over unix sockets: within one machine
  kFabric,      ///< VMM memory, passed as fabric handles: multi-node NVLink
  kIpc,         ///< cudaMalloc and CUDA IPC handles: where the driver cannot export VMM memory
};

/// A Window in the memory of the GPU that is current when it is made. Addresses are device
/// addresses of this process, valid in kernels on that GPU; the host must not follow them.
///
/// bytes() is what was asked for, rounded up to the granularity of the device (2 MiB). All of it is
/// taken when the window is made, and is zero before any rank returns. own() outlives the window,
/// and with it this rank's mapping, so that tensors stay readable after Buffer::destroy(); peers'
/// mappings end with the window, which therefore must outlive every kernel that uses them.
class GpuWindow : public Window {
 public:
  /// Ordinal, in this process, of the GPU that the window is on.
  virtual int device() const = 0;
  virtual WindowShare share() const = 0;
};

/// Collective. All ranks of one machine share file descriptors; ranks of several machines share
/// fabric handles, where every driver and device offers them; where VMM memory cannot be exported
/// at all, CUDA IPC. Every step is voted on: if it fails on any rank, all ranks throw the same
/// Error, which names the ranks, the step, the driver's reason and what to do. PeerLost if a rank
/// does not answer within timeout_s. Nothing has a name in a file system, so a process that is
/// killed leaves nothing behind.
///
/// alive(rank) watches the process behind rank on one machine; across machines it is always true.
std::unique_ptr<GpuWindow> make_gpu_window(Bootstrap& bootstrap, size_t bytes, double timeout_s);

}  // namespace epcomm
