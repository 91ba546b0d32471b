// The cpu transport: shared-memory windows between processes (or threads) of one machine.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace epcomm {

std::unique_ptr<Transport> make_cpu_transport(const TransportContext& context);

}  // namespace epcomm
