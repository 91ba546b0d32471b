// The transports that run on simulated devices.
#include "transport/hierarchical_gpu.h"
#include "transport/nccl.h"
#include "transport/nvlink.h"
#include "transport/rdma.h"
#include "transport/transport.h"

namespace epcomm {

const std::vector<TransportEntry>& transports() {
  static const std::vector<TransportEntry> all = {
      {"hierarchical", &make_hierarchical_gpu_transport},
      {"nccl", &make_nccl_transport},
      {"nvlink", &make_nvlink_transport},
      {"rdma", &make_rdma_transport}};
  return all;
}

}  // namespace epcomm
