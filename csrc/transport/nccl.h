// The nccl transport: for machines without peer access between GPUs, and across hosts.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace epcomm {

/// transport_options:
///   algorithm  "auto", "exact", "static" or "allgather"; see nccl.cc for what each moves
///   schedule   "grouped" or "shifted"
///   chunks     pieces that a batch is sent in by "exact", 1 to 8; packing one overlaps sending
///   another
std::unique_ptr<Transport> make_nccl_transport(const TransportContext& context);

}  // namespace epcomm
