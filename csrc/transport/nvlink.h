// The nvlink transport: for GPUs that load and store each other's memory.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace epcomm {

std::unique_ptr<Transport> make_nvlink_transport(const TransportContext& context);

}  // namespace epcomm
