// The nccl transport: for machines without peer access between GPUs, and across hosts.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace epcomm {

/// transport_options:
///   algorithm  "auto", "exact", "static", "small", "allgather" or "window"; nccl_transport.h says
///              what each moves
///   schedule   "auto", "grouped", "shifted" or "gathered"
///   chunks     pieces that a batch is sent in by "exact", 1 to 8; packing one overlaps sending
///              another
///   ctas       the fewest thread blocks that NCCL prepares for
std::unique_ptr<Transport> make_nccl_transport(const TransportContext& context);

}  // namespace epcomm
