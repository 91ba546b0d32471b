// The transports of module _core.
#include "transport/cpu.h"
#include "transport/transport.h"

namespace epcomm {

const std::vector<TransportEntry>& transports() {
  static const std::vector<TransportEntry> all = {{"cpu", &make_cpu_transport}};
  return all;
}

}  // namespace epcomm
