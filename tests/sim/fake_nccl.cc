// libnccl on simulated devices: the functions that epcomm calls, between ranks that are threads or
// processes of one machine. Found by the nccl transport instead of csrc/transport/nccl_api.cc.
//
// As NCCL does it: what a group holds is one piece of work on its stream, all its messages progress
// side by side through a small buffer per pair of ranks, several messages to one peer keep their
// order, and nothing is read or written before the stream gets there. A message that its receiver
// expects with other bytes is a fault; with NCCL it would hang or overwrite memory.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/clock.h"
#include "epcomm/error.h"
#include "tests/sim/devices.h"
#include "transport/nccl_api.h"

namespace epcomm {
namespace {

constexpr ncclResult_t kSystemError{2}, kInvalidUsage{5}, kRemoteError{6};
std::atomic<uint32_t> broken_devices{0};  // one bit each
std::atomic<int> refused_late_ms{0};
constexpr int kMaxRanks = 8;
constexpr double kJoinS = 20;

// A message, in the buffer of its pair: a header, then the bytes.
struct Header {
  uint64_t bytes;
  uint64_t kind;  // a send meets a receive, and a collective itself
};
enum Kind : uint64_t { kPoint = 1, kAllGather, kReduceScatter };

// What one rank sends another, in order.
struct Fifo {
  static constexpr size_t kBytes = 64 << 10;
  std::atomic<uint64_t> written, read;
  char data[kBytes];

  size_t put(const char* from, size_t bytes) {
    const uint64_t at = written.load(std::memory_order_relaxed);
    const size_t n = std::min<size_t>(bytes, kBytes - (at - read.load(std::memory_order_acquire)));
    for (size_t i = 0; i < n; ++i) data[(at + i) % kBytes] = from[i];
    written.store(at + n, std::memory_order_release);
    return n;
  }
  size_t take(char* to, size_t bytes) {
    const uint64_t at = read.load(std::memory_order_relaxed);
    const size_t n = std::min<size_t>(bytes, written.load(std::memory_order_acquire) - at);
    for (size_t i = 0; i < n; ++i) to[i] = data[(at + i) % kBytes];
    read.store(at + n, std::memory_order_release);
    return n;
  }
};

// Memory that all ranks map, zero at first.
struct Shared {
  std::atomic<int> joined;
  Fifo fifo[kMaxRanks][kMaxRanks];  // [from][to]
};

// One direction of one message.
struct Transfer {
  bool sends;
  int peer;
  Header header;
  char* data;
  size_t done = 0;  // of the header, then of the data

  bool finished() const { return done == sizeof header + header.bytes; }
};

}  // namespace

struct ncclComm {
  Shared* shared;
  int rank, num_ranks, device;
  std::atomic<bool> aborted{false};
  ~ncclComm() { ::munmap(shared, sizeof(Shared)); }
  ncclResult_t state() const {
    return (broken_devices >> device & 1) != 0 ? kRemoteError : ncclSuccess;
  }
  bool refuses() const {
    if (state() == ncclSuccess) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(refused_late_ms));
    return true;
  }

  // Moves what there is and room for. Returns the bytes moved.
  size_t progress(Transfer& t) {
    Fifo& fifo = t.sends ? shared->fifo[rank][t.peer] : shared->fifo[t.peer][rank];
    if (t.done < sizeof t.header) {
      if (t.sends) {
        const auto* header = reinterpret_cast<const char*>(&t.header);
        const size_t n = fifo.put(header + t.done, sizeof t.header - t.done);
        t.done += n;
        return n;
      }
      Header came;
      if (fifo.written.load(std::memory_order_acquire) - fifo.read.load(std::memory_order_relaxed) <
          sizeof came)
        return 0;
      fifo.take(reinterpret_cast<char*>(&came), sizeof came);
      if (came.bytes != t.header.bytes || came.kind != t.header.kind) {
        sim::raise_fault(device, "NCCL: rank " + std::to_string(t.peer) + " sent rank " +
                                     std::to_string(rank) + " a message of " +
                                     std::to_string(came.bytes) + " bytes (kind " +
                                     std::to_string(came.kind) + "), which expected " +
                                     std::to_string(t.header.bytes) + " (kind " +
                                     std::to_string(t.header.kind) + ")");
        aborted = true;
      }
      t.done = sizeof came;
      return sizeof came;
    }
    const size_t at = t.done - sizeof t.header, left = t.header.bytes - at;
    const size_t n = t.sends ? fifo.put(t.data + at, left) : fifo.take(t.data + at, left);
    t.done += n;
    return n;
  }

  // Until all transfers are over, or the communicator is aborted. Those with one peer in one
  // direction keep their order.
  void run(std::vector<Transfer> transfers) {
    const Deadline deadline(sim::options().limit_s);
    for (;;) {
      bool all_finished = true;
      size_t moved = 0;
      std::vector<std::pair<bool, int>> busy;
      for (Transfer& t : transfers) {
        if (t.finished()) continue;
        all_finished = false;
        const std::pair lane(t.sends, t.peer);
        if (std::find(busy.begin(), busy.end(), lane) != busy.end()) continue;
        busy.push_back(lane);
        moved += progress(t);
      }
      if (all_finished || aborted) return;
      if (moved != 0) continue;
      std::this_thread::sleep_for(std::chrono::microseconds(20));
      if (deadline.passed()) {
        sim::raise_fault(device, "NCCL: rank " + std::to_string(rank) +
                                     " waits for a message that does not come");
        return;
      }
    }
  }
};

namespace {

// Calls of one group, of one communicator and stream.
struct Group {
  int depth = 0;
  ncclComm* comm = nullptr;
  cudaStream_t stream = nullptr;
  std::vector<Transfer> transfers;
};
thread_local Group group;

char* writable(const void* p) { return static_cast<char*>(const_cast<void*>(p)); }

// NCCL orders the work of a communicator, whatever its streams; so the tests know no other order,
// all of it must be on one stream at a time.
ncclResult_t launch() {
  if (group.comm == nullptr) return ncclSuccess;
  ncclComm* comm = std::exchange(group.comm, nullptr);
  auto transfers = std::exchange(group.transfers, {});
  sim::resolve(group.stream).enqueue([comm, transfers](sim::FiberPool&) {
    if (!sim::failed(comm->device)) comm->run(transfers);
  });
  return ncclSuccess;
}

ncclResult_t add(const Transfer& transfer, ncclComm* comm, cudaStream_t stream) {
  if (comm->refuses()) return kRemoteError;
  if (comm->aborted || transfer.peer == comm->rank ||
      (group.comm != nullptr && (group.comm != comm || group.stream != stream)))
    return kInvalidUsage;
  group.comm = comm;
  group.stream = stream;
  group.transfers.push_back(transfer);
  return group.depth == 0 ? launch() : ncclSuccess;
}

ncclResult_t get_version(int* version) {
  *version = 22809;
  return ncclSuccess;
}

ncclResult_t get_unique_id(ncclUniqueId* id) {
  const std::string name = "/epcomm-sim-" + std::to_string(std::random_device()()) + "-" +
                           std::to_string(std::random_device()());
  *id = {};
  std::copy(name.begin(), name.end(), id->internal);
  const int fd = ::shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
  if (fd < 0) return kSystemError;
  const bool sized = ::ftruncate(fd, sizeof(Shared)) == 0;
  ::close(fd);
  return sized ? ncclSuccess : kSystemError;
}

ncclResult_t comm_init_rank(ncclComm** out, int num_ranks, ncclUniqueId id, int rank) {
  if (num_ranks > kMaxRanks) return kInvalidUsage;
  const int fd = ::shm_open(id.internal, O_RDWR, 0600);
  if (fd < 0) return kSystemError;
  void* memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (memory == MAP_FAILED) return kSystemError;
  auto comm = std::make_unique<ncclComm>();
  comm->shared = static_cast<Shared*>(memory);
  comm->rank = rank;
  comm->num_ranks = num_ranks;
  cudaGetDevice(&comm->device);
  if (++comm->shared->joined == num_ranks) ::shm_unlink(id.internal);
  const Deadline deadline(kJoinS);
  while (comm->shared->joined != num_ranks) {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    if (deadline.passed()) {
      ::shm_unlink(id.internal);
      return kSystemError;
    }
  }
  *out = comm.release();
  return ncclSuccess;
}

ncclResult_t comm_init_rank_config(ncclComm** out, int num_ranks, ncclUniqueId id, int rank,
                                   ncclConfig_v21800* config) {
  if (config->size != sizeof *config || config->magic != 0xcafebeef || config->minCTAs < 1 ||
      config->minCTAs > config->maxCTAs)
    return kInvalidUsage;
  return comm_init_rank(out, num_ranks, id, rank);
}

// What is on a stream still refers to the communicator: it is never freed.
ncclResult_t comm_abort(ncclComm* comm) {
  comm->aborted = true;
  return ncclSuccess;
}

ncclResult_t comm_get_async_error(ncclComm* comm, ncclResult_t* error) {
  *error = comm->state();
  return ncclSuccess;
}

const char* get_error_string(ncclResult_t code) {
  return code == kInvalidUsage  ? "invalid usage"
         : code == kRemoteError ? "remote process exited or there was a network error"
                                : "unhandled system error";
}
const char* get_last_error(ncclComm*) { return "simulated NCCL"; }

ncclResult_t group_start() {
  ++group.depth;
  return ncclSuccess;
}
ncclResult_t group_end() { return --group.depth == 0 ? launch() : ncclSuccess; }

ncclResult_t send(const void* data, size_t count, ncclDataType_t, int peer, ncclComm* comm,
                  cudaStream_t stream) {
  return add({true, peer, {count, kPoint}, writable(data)}, comm, stream);
}

ncclResult_t recv(void* data, size_t count, ncclDataType_t, int peer, ncclComm* comm,
                  cudaStream_t stream) {
  return add({false, peer, {count, kPoint}, static_cast<char*>(data)}, comm, stream);
}

ncclResult_t all_gather(const void* from, void* to, size_t bytes, ncclDataType_t, ncclComm* comm,
                        cudaStream_t stream) {
  if (comm->refuses()) return kRemoteError;
  if (comm->aborted) return kInvalidUsage;
  std::vector<Transfer> transfers;
  auto piece = [&](int r) { return static_cast<char*>(to) + static_cast<size_t>(r) * bytes; };
  for (int r = 0; r < comm->num_ranks; ++r) {
    if (r == comm->rank) continue;
    transfers.push_back({true, r, {bytes, kAllGather}, writable(from)});
    transfers.push_back({false, r, {bytes, kAllGather}, piece(r)});
  }
  sim::resolve(stream).enqueue([=, own = piece(comm->rank)](sim::FiberPool&) {
    if (sim::failed(comm->device)) return;
    std::memmove(own, from, bytes);
    comm->run(transfers);
  });
  return ncclSuccess;
}

ncclResult_t reduce_scatter(const void* from, void* to, size_t count, ncclDataType_t, ncclRedOp_t,
                            ncclComm* comm, cudaStream_t stream) {
  if (comm->refuses()) return kRemoteError;
  if (comm->aborted) return kInvalidUsage;
  sim::resolve(stream).enqueue([=](sim::FiberPool&) {
    if (sim::failed(comm->device)) return;
    const size_t ranks = static_cast<size_t>(comm->num_ranks), bytes = count * sizeof(float);
    const auto* mine = static_cast<const float*>(from);
    std::vector<float> came(ranks * count);
    std::vector<Transfer> transfers;
    for (size_t r = 0; r < ranks; ++r) {
      const int peer = static_cast<int>(r);
      if (peer == comm->rank) {
        std::copy_n(mine + r * count, count, came.begin() + static_cast<ptrdiff_t>(r * count));
        continue;
      }
      transfers.push_back({true, peer, {bytes, kReduceScatter}, writable(mine + r * count)});
      transfers.push_back(
          {false, peer, {bytes, kReduceScatter}, reinterpret_cast<char*>(&came[r * count])});
    }
    comm->run(transfers);
    auto* sum = static_cast<float*>(to);
    std::fill_n(sum, count, 0.0f);
    for (size_t r = 0; r < ranks; ++r)
      for (size_t i = 0; i < count; ++i) sum[i] += came[r * count + i];
  });
  return ncclSuccess;
}

}  // namespace

sim::BrokenNccl::BrokenNccl(int device, int late_ms) : device_(device) {
  refused_late_ms = late_ms;
  broken_devices |= 1u << device;
}
sim::BrokenNccl::~BrokenNccl() { broken_devices &= ~(1u << device_); }

const NcclApi& NcclApi::get() {
  static const NcclApi api = {get_version,
                              get_unique_id,
                              comm_init_rank,
                              comm_init_rank_config,
                              comm_abort,
                              comm_get_async_error,
                              get_error_string,
                              get_last_error,
                              group_start,
                              group_end,
                              send,
                              recv,
                              all_gather,
                              reduce_scatter};
  return api;
}

void check_nccl(ncclResult_t code, const char* call) {
  if (code != ncclSuccess) throw Error(std::string(call) + ": " + get_error_string(code));
}

}  // namespace epcomm
