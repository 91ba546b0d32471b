// The hierarchical transport between GPUs: see hierarchical_gpu.cc.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace epcomm {

std::unique_ptr<Transport> make_hierarchical_gpu_transport(const TransportContext& context);

}  // namespace epcomm
