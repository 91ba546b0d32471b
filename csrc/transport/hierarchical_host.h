// The hierarchical transport on the windows of one machine: the two-stage algorithm, with nodes
// that ranks_per_node makes of the ranks.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace epcomm {

/// transport_options:
///   chunk_tokens  rows that are sent, forwarded, added up and returned at a time; at least 1
std::unique_ptr<Transport> make_hierarchical_host_transport(const TransportContext& context);

}  // namespace epcomm
