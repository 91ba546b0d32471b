// What the transports over NVSHMEM share: their windows as kernels get them, and which ways between
// ranks are proven.
#pragma once

#include <memory>
#include <string>

#include "epcomm/bootstrap.h"
#include "transport/gpu_link_transport.h"
#include "transport/gpu_nvshmem.h"

namespace epcomm {

/// This rank's memory alone has an address; the others have numbers.
LinkWindows nvshmem_windows(const std::shared_ptr<NvshmemWindow>& window, const Bootstrap& group);

/// Collective. Throws the same Error on all ranks where NVSHMEM goes over a network: docs/rdma.md,
/// "Over a network", says what is not proven.
void check_mapped(Bootstrap& group, const NvshmemWindow& window, const std::string& transport);

}  // namespace epcomm
