// The transports that run on simulated devices.
#include "transport/nvlink.h"
#include "transport/transport.h"

namespace epcomm {

const std::vector<TransportEntry>& transports() {
  static const std::vector<TransportEntry> all = {{"nvlink", &make_nvlink_transport}};
  return all;
}

}  // namespace epcomm
