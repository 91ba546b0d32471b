#include "transport/nccl_comm.h"

#include <chrono>
#include <cstring>
#include <exception>
#include <future>
#include <memory>
#include <string>
#include <thread>

#include "core/clock.h"
#include "epcomm/error.h"
#include "transport/gpu_memory.h"

namespace epcomm {
namespace {

constexpr auto kAbortPatience = std::chrono::seconds(1);

// What a rank tells the others before the communicator is made.
struct Introduction {
  ncclUniqueId id;  // rank 0's counts
  cudaUUID_t gpu;   // never the ordinal, which CUDA_VISIBLE_DEVICES renames
};

Introduction introduce() {
  int device = 0;
  EPCOMM_CUDA_TRY(cudaGetDevice(&device));
  cudaDeviceProp properties{};
  EPCOMM_CUDA_TRY(cudaGetDeviceProperties(&properties, device));
  return {{}, properties.uuid};
}

// Throws on all ranks if two of them use one GPU: NCCL would refuse it less plainly.
void check_own_gpus(const std::vector<Introduction>& all) {
  for (size_t a = 0; a < all.size(); ++a)
    for (size_t b = a + 1; b < all.size(); ++b)
      EPCOMM_CHECK(
          std::memcmp(&all[a].gpu, &all[b].gpu, sizeof(cudaUUID_t)) != 0,
          "ranks " + std::to_string(a) + " and " + std::to_string(b) +
              " use the same GPU; call torch.cuda.set_device with a GPU of its own on each rank");
}

// ncclCommInitRank has no timeout. It runs on a thread of its own; if a peer never comes, the
// thread is left to NCCL's own error handling and this rank goes on.
ncclComm_t init_bounded(const NcclApi& api, int rank, int num_ranks, const ncclUniqueId& id,
                        double timeout_s) {
  int device = 0;
  EPCOMM_CUDA_TRY(cudaGetDevice(&device));
  auto made = std::make_shared<std::promise<ncclComm_t>>();
  std::future<ncclComm_t> future = made->get_future();
  std::thread([made, &api, rank, num_ranks, id, device] {
    try {
      EPCOMM_CUDA_TRY(cudaSetDevice(device));
      ncclComm_t comm = nullptr;
      EPCOMM_NCCL_TRY(api.CommInitRank(&comm, num_ranks, id, rank));
      made->set_value(comm);
    } catch (...) {
      made->set_exception(std::current_exception());
    }
  }).detach();
  if (future.wait_for(std::chrono::duration<double>(timeout_s)) != std::future_status::ready)
    throw PeerLost(-1, Operation::kInit, 0, "some rank did not join the NCCL communicator in time");
  return future.get();
}

}  // namespace

NcclComm::NcclComm(Bootstrap& bootstrap, double timeout_s)
    : api_(NcclApi::get()), rank_(bootstrap.rank()), num_ranks_(bootstrap.size()) {
  Introduction mine = introduce();
  if (rank_ == 0) EPCOMM_NCCL_TRY(api_.GetUniqueId(&mine.id));
  std::vector<Introduction> all(static_cast<size_t>(num_ranks_));
  bootstrap.all_gather(&mine, all.data(), sizeof mine);
  check_own_gpus(all);
  comm_ = init_bounded(api_, rank_, num_ranks_, all[0].id, timeout_s);
  try {
    connect(timeout_s);
  } catch (...) {
    abort();
    throw;
  }
}

NcclComm::~NcclComm() { abort(); }

// First use of a pair or of a collective makes NCCL allocate and handshake; that belongs in set-up.
void NcclComm::connect(double timeout_s) {
  const size_t n = static_cast<size_t>(num_ranks_);
  const size_t bytes = size_t{1} << 20;  // large enough for every channel of a pair
  const DeviceMemory send(n * bytes), recv(n * bytes);
  const Stream stream;
  const Event done;
  std::vector<Message> messages;
  for (int p = 0; p < num_ranks_; ++p)
    if (p != rank_)
      messages.push_back({p, send.get() + static_cast<size_t>(p) * bytes, bytes,
                          recv.get() + static_cast<size_t>(p) * bytes, bytes});
  exchange(messages, Schedule::kGrouped, stream.get());
  all_gather(send.get(), recv.get(), bytes, stream.get());
  reduce_scatter(send.as<float>(), recv.as<float>(), bytes / sizeof(float), stream.get());
  EPCOMM_CUDA_TRY(cudaEventRecord(done.get(), stream.get()));
  const Deadline deadline(timeout_s);
  while (cudaEventQuery(done.get()) == cudaErrorNotReady) {
    if (deadline.passed()) {
      abort();  // before the memory above is freed, which waits for the kernels that use it
      throw PeerLost(-1, Operation::kInit, 0, "some rank did not answer over NCCL in time");
    }
    std::this_thread::yield();
  }
}

void NcclComm::exchange(const std::vector<Message>& messages, Schedule schedule,
                        cudaStream_t stream) {
  const bool shifted = schedule == Schedule::kShifted;
  const int rounds = shifted ? num_ranks_ - 1 : 1;
  for (int round = 1; round <= rounds; ++round) {
    const int to = (rank_ + round) % num_ranks_, from = (rank_ - round + num_ranks_) % num_ranks_;
    EPCOMM_NCCL_TRY(api_.GroupStart());
    for (const Message& m : messages) {
      if (m.send_bytes != 0 && (!shifted || m.peer == to))
        EPCOMM_NCCL_TRY(api_.Send(m.send, m.send_bytes, ncclUint8, m.peer, comm_, stream));
      if (m.recv_bytes != 0 && (!shifted || m.peer == from))
        EPCOMM_NCCL_TRY(api_.Recv(m.recv, m.recv_bytes, ncclUint8, m.peer, comm_, stream));
    }
    EPCOMM_NCCL_TRY(api_.GroupEnd());
  }
}

void NcclComm::all_gather(const void* send, void* recv, size_t bytes, cudaStream_t stream) {
  EPCOMM_NCCL_TRY(api_.AllGather(send, recv, bytes, ncclUint8, comm_, stream));
}

void NcclComm::reduce_scatter(const float* send, float* recv, size_t count, cudaStream_t stream) {
  EPCOMM_NCCL_TRY(api_.ReduceScatter(send, recv, count, ncclFloat32, ncclSum, comm_, stream));
}

void NcclComm::abort() {
  if (comm_ == nullptr || aborted_.exchange(true)) return;
  // NCCL waits in here for CUDA graphs that still hold its kernels. They may outlive the Buffer, so
  // this gets a moment, and then goes on by itself until the last of them is gone.
  auto done = std::make_shared<std::promise<void>>();
  std::future<void> future = done->get_future();
  std::thread([done, comm = comm_, &api = api_] {
    api.CommAbort(comm);
    done->set_value();
  }).detach();
  future.wait_for(kAbortPatience);
}

}  // namespace epcomm
