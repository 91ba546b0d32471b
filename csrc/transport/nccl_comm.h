// One NCCL communicator of epcomm's own, and the exchanges that the nccl transport makes with it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

#include "epcomm/bootstrap.h"
#include "epcomm/types.h"
#include "transport/gpu_memory.h"
#include "transport/nccl_api.h"

namespace epcomm {

/// Order of the messages of an exchange.
enum class Schedule {
  kAuto,     ///< of a batch that all ranks get whole: one all-gather; else as kGrouped
  kGrouped,  ///< all peers at once
  kShifted,  ///< rounds i = 1..R-1 in which rank r sends to r + i and receives from r - i only
  kGathered  ///< of two ranks with as many bytes each: one all-gather
};

/// Bytes for, and from, one peer. Messages of 0 bytes are not sent; both sides know which those
/// are.
struct Message {
  int peer;
  const void* send;
  size_t send_bytes;
  void* recv;
  size_t recv_bytes;
};

class NcclComm {
 public:
  static constexpr int kMostCtas = 64;  ///< what NCCL can use; older versions cut it to 32

  /// Collective. Also connects all pairs, so that later calls neither allocate nor block. ctas: the
  /// fewest thread blocks that NCCL prepares for (ncclConfig_t::minCTAs), at most kMostCtas, 0 =
  /// its choice. PeerLost after options.timeout_s. Ranks of one options.host need a GPU each.
  NcclComm(Bootstrap& bootstrap, const BufferOptions& options, int ctas);
  ~NcclComm();
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;

  /// Messages to and from other ranks; several to one peer keep their order.
  void exchange(const std::vector<Message>& messages, Schedule schedule, cudaStream_t stream);
  /// recv[r * bytes, ...) = rank r's send, which may lie there already.
  void all_gather(const void* send, void* recv, size_t bytes, cudaStream_t stream);
  /// recv = sum over ranks of their block for this rank, fp32. The order of the sum is NCCL's.
  void reduce_scatter(const float* send, float* recv, size_t count, cudaStream_t stream);
  /// True once NCCL has met an error, until abort().
  bool failed() const;
  /// Makes all kernels of the communicator leave, on any thread, once. Nothing can be sent
  /// afterwards.
  void abort();

 private:
  NcclComm(const NcclApi& api, ncclComm_t comm, int device, int rank, int num_ranks);
  void connect();
  const NcclApi& api_;
  int rank_, num_ranks_;
  int device_ = 0;
  ncclComm_t comm_ = nullptr;
  mutable std::mutex ending_;
  bool aborted_ = false;
};

}  // namespace epcomm
