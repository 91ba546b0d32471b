// The transports of module _nvshmem.
#include "transport/hierarchical_gpu.h"
#include "transport/rdma.h"
#include "transport/transport.h"

namespace epcomm {

const std::vector<TransportEntry>& transports() {
  static const std::vector<TransportEntry> all = {
      {"hierarchical", &make_hierarchical_gpu_transport}, {"rdma", &make_rdma_transport}};
  return all;
}

}  // namespace epcomm
