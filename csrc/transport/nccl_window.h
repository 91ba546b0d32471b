// The nccl transport without NCCL: small batches between GPUs of one host that address each other
// go the way that nvlink's go, one kernel per call that stores into the peers' windows.
#pragma once

#include <memory>
#include <string>

#include "transport/transport.h"

namespace epcomm {

/// Why the Buffer's calls cannot go so; empty = they can. Collective, and the same on all ranks,
/// whatever their environments: all ranks are on one host and none refuses (BufferOptions).
/// PeerLost if a rank does not answer within the timeout.
std::string why_no_window(const TransportContext& context);

/// Where why_no_window() is empty. Collective. choice: see Buffer::choice.
std::unique_ptr<Transport> make_nccl_window_transport(const TransportContext& context,
                                                      std::string choice);

}  // namespace epcomm
