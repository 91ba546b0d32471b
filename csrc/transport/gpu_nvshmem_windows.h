// What the transports over NVSHMEM share: their windows as kernels get them.
#pragma once

#include <memory>

#include "epcomm/bootstrap.h"
#include "transport/gpu_link_transport.h"
#include "transport/gpu_nvshmem.h"

namespace epcomm {

/// This rank's memory alone has an address; the others have numbers. Rows may be cut for those that
/// NVSHMEM maps.
LinkWindows nvshmem_windows(const std::shared_ptr<NvshmemWindow>& window, const Bootstrap& group);

}  // namespace epcomm
