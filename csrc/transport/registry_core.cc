// The transports of module _core.
#include "transport/cpu.h"
#include "transport/hierarchical_host.h"
#include "transport/transport.h"

namespace epcomm {

const std::vector<TransportEntry>& transports() {
  static const std::vector<TransportEntry> all = {
      {"cpu", &make_cpu_transport}, {"hierarchical", &make_hierarchical_host_transport}};
  return all;
}

}  // namespace epcomm
