// The rdma transport: small batches between GPUs that reach each other through NVSHMEM.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace epcomm {

std::unique_ptr<Transport> make_rdma_transport(const TransportContext& context);

}  // namespace epcomm
