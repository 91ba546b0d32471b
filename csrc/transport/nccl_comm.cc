#include "transport/nccl_comm.h"

#include <chrono>
#include <cstring>
#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "epcomm/error.h"

namespace epcomm {
namespace {

constexpr auto kAbortPatience = std::chrono::seconds(1);

// On a thread of NCCL's: what it calls must not end the capture of a graph on another thread, which
// torch's captures else forbid to the whole process.
void leave_captures_alone() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
}

// What a rank tells the others before the communicator is made.
struct Introduction {
  ncclUniqueId id;  // rank 0's counts
  cudaUUID_t gpu;   // never the ordinal, which CUDA_VISIBLE_DEVICES renames
  char host[96];    // NCCL_HOSTID; empty = none
};

Introduction introduce(const std::string& host) {
  int device = 0;
  EPCOMM_CUDA_TRY(cudaGetDevice(&device));
  cudaDeviceProp properties{};
  EPCOMM_CUDA_TRY(cudaGetDeviceProperties(&properties, device));
  Introduction mine{{}, properties.uuid, {}};
  std::strncpy(mine.host, host.c_str(), sizeof mine.host - 1);
  return mine;
}

// As NCCL takes it: ranks that NCCL_HOSTID puts on different hosts may share a GPU.
bool share_gpu(const Introduction& a, const Introduction& b) {
  return std::memcmp(&a.gpu, &b.gpu, sizeof a.gpu) == 0 && std::strcmp(a.host, b.host) == 0;
}

// Throws on all ranks if two of them use one GPU: NCCL would refuse it less plainly.
void check_own_gpus(const std::vector<Introduction>& all) {
  for (size_t a = 0; a < all.size(); ++a)
    for (size_t b = a + 1; b < all.size(); ++b)
      EPCOMM_CHECK(
          !share_gpu(all[a], all[b]),
          "ranks " + std::to_string(a) + " and " + std::to_string(b) +
              " use the same GPU; call torch.cuda.set_device with a GPU of its own on each rank");
}

// Closes an NCCL group also when a call in it throws: the depth of groups is NCCL's, per thread,
// and shared with torch.
class Group {
 public:
  explicit Group(const NcclApi& api) : api_(api) { EPCOMM_NCCL_TRY(api_.GroupStart()); }
  ~Group() {
    if (open_) api_.GroupEnd();
  }
  void end() {
    open_ = false;
    EPCOMM_NCCL_TRY(api_.GroupEnd());
  }

 private:
  const NcclApi& api_;
  bool open_ = true;
};

}  // namespace

NcclComm::NcclComm(Bootstrap& bootstrap, const BufferOptions& options, int ctas)
    : api_(NcclApi::get()), rank_(bootstrap.rank()), num_ranks_(bootstrap.size()) {
  Introduction mine = introduce(options.host);
  if (rank_ == 0) EPCOMM_NCCL_TRY(api_.GetUniqueId(&mine.id));
  std::vector<Introduction> all(static_cast<size_t>(num_ranks_));
  bootstrap.all_gather(&mine, all.data(), sizeof mine);
  check_own_gpus(all);

  // Neither making a communicator nor the first use of a pair has a timeout. Both run on a thread
  // of their own; if a peer never comes, the thread is left to NCCL's own error handling and this
  // rank goes on.
  EPCOMM_CUDA_TRY(cudaGetDevice(&device_));
  auto made = std::make_shared<std::promise<ncclComm_t>>();
  std::future<ncclComm_t> future = made->get_future();
  std::thread([made, &api = api_, rank = rank_, num_ranks = num_ranks_, id = all[0].id,
               device = device_, ctas] {
    try {
      leave_captures_alone();
      EPCOMM_CUDA_TRY(cudaSetDevice(device));
      ncclComm_t comm = nullptr;
      ncclConfig_v21800 config;
      config.minCTAs = ctas;
      config.maxCTAs = kMostCtas;  // NCCL takes "unset" for fewer than any minimum
      if (ctas == 0)
        EPCOMM_NCCL_TRY(api.CommInitRank(&comm, num_ranks, id, rank));
      else
        EPCOMM_NCCL_TRY(api.CommInitRankConfig(&comm, num_ranks, id, rank, &config));
      NcclComm(api, comm, device, rank, num_ranks).connect();
      made->set_value(comm);
    } catch (...) {
      made->set_exception(std::current_exception());
    }
  }).detach();
  if (future.wait_for(std::chrono::duration<double>(options.timeout_s)) !=
      std::future_status::ready)
    throw PeerLost(-1, Operation::kInit, 0, "some rank did not join the NCCL communicator in time");
  comm_ = future.get();
}

NcclComm::NcclComm(const NcclApi& api, ncclComm_t comm, int device, int rank, int num_ranks)
    : api_(api), rank_(rank), num_ranks_(num_ranks), device_(device), comm_(comm) {}

NcclComm::~NcclComm() { abort(); }

// First use of a pair or of a collective makes NCCL allocate and handshake; that belongs in set-up.
void NcclComm::connect() {
  const size_t n = static_cast<size_t>(num_ranks_);
  const size_t bytes = size_t{1} << 20;  // large enough for every channel of a pair
  const DeviceMemory send(n * bytes), recv(n * bytes);
  const Stream stream;
  std::vector<Message> messages;
  for (int p = 0; p < num_ranks_; ++p)
    if (p != rank_)
      messages.push_back({p, send.get() + static_cast<size_t>(p) * bytes, bytes,
                          recv.get() + static_cast<size_t>(p) * bytes, bytes});
  exchange(messages, Schedule::kGrouped, stream.get());
  all_gather(send.get(), recv.get(), bytes, stream.get());
  reduce_scatter(send.as<float>(), recv.as<float>(), bytes / sizeof(float), stream.get());
  EPCOMM_CUDA_TRY(cudaStreamSynchronize(stream.get()));
  comm_ = nullptr;  // the caller's
}

bool NcclComm::failed() const {
  ncclResult_t state = ncclSuccess;
  std::lock_guard lock(ending_);  // a communicator that is being aborted must not be asked
  if (aborted_ || api_.CommGetAsyncError(comm_, &state) != ncclSuccess) return false;
  return state != ncclSuccess && state != ncclInProgress;
}

void NcclComm::exchange(const std::vector<Message>& messages, Schedule schedule,
                        cudaStream_t stream) {
  const bool shifted = schedule == Schedule::kShifted;
  const int rounds = shifted ? num_ranks_ - 1 : 1;
  for (int round = 1; round <= rounds; ++round) {
    const int to = (rank_ + round) % num_ranks_, from = (rank_ - round + num_ranks_) % num_ranks_;
    Group group(api_);
    for (const Message& m : messages) {
      if (m.send_bytes != 0 && (!shifted || m.peer == to))
        EPCOMM_NCCL_TRY(api_.Send(m.send, m.send_bytes, ncclUint8, m.peer, comm_, stream));
      if (m.recv_bytes != 0 && (!shifted || m.peer == from))
        EPCOMM_NCCL_TRY(api_.Recv(m.recv, m.recv_bytes, ncclUint8, m.peer, comm_, stream));
    }
    group.end();
  }
}

void NcclComm::all_gather(const void* send, void* recv, size_t bytes, cudaStream_t stream) {
  EPCOMM_NCCL_TRY(api_.AllGather(send, recv, bytes, ncclUint8, comm_, stream));
}

void NcclComm::reduce_scatter(const float* send, float* recv, size_t count, cudaStream_t stream) {
  EPCOMM_NCCL_TRY(api_.ReduceScatter(send, recv, count, ncclFloat32, ncclSum, comm_, stream));
}

void NcclComm::abort() {
  {
    std::lock_guard lock(ending_);
    if (comm_ == nullptr || aborted_) return;
    aborted_ = true;
  }
  // NCCL waits in here for CUDA graphs that still hold its kernels. They may outlive the Buffer, so
  // this gets a moment, and then goes on by itself until the last of them is gone.
  auto done = std::make_shared<std::promise<void>>();
  std::future<void> future = done->get_future();
  std::thread([done, comm = comm_, &api = api_, device = device_] {
    leave_captures_alone();
    cudaSetDevice(device);  // else NCCL makes a context on device 0
    api.CommAbort(comm);
    done->set_value();
  }).detach();
  future.wait_for(kAbortPatience);
}

}  // namespace epcomm
