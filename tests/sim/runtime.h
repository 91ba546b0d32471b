// Simulated devices and their streams. A stream is a queue that an OS thread of its own works off,
// so that the host is ahead of it as it is of a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tests/sim/fiber.h"
#include "tests/sim/grid.h"

namespace epcomm::sim {

/// Of all devices. Set before the first use of one.
struct Options {
  uint64_t seed;  ///< the environment's EPCOMM_SIM_SEED, else 1
  int num_devices = 8;
  int num_sms = 2;
  /// SMs that other work holds: blocks that have no room start when others have ended, in any
  /// order.
  int busy_sms = 0;
  /// Bulk stores are written when they are waited for, or their grid ends, and not before.
  bool late_bulk_stores = false;
  double limit_s = 60;  ///< that a grid or an event may take before it counts as a deadlock
  size_t memory_bytes = size_t{4} << 30;  ///< of a device
  bool print_faults = true;
  /// Pairs of devices of which the first cannot address the memory of the second.
  std::vector<std::pair<int, int>> no_peer_access;
  /// Whether NVSHMEM says that a rank has mapped a peer's memory. All is put over the card, but
  /// rows for mapped peers in pieces. The environment's EPCOMM_SIM_MAPPED: "all", "none", else
  /// "odd": ranks at odd distances.
  bool (*mapped)(int rank, int peer);
};
Options& options();

/// What kernels of all devices did wrong since the last call, oldest first; devices work again.
/// While a device has a fault its kernels do not run and its streams report
/// cudaErrorLaunchFailure.
std::vector<std::string> take_faults();

/// While it lives the connections of NCCL's communicators on a device are broken: they say so, and
/// refuse calls, late_ms after they were made.
class BrokenNccl {
 public:
  BrokenNccl(int device, int late_ms);
  ~BrokenNccl();
  BrokenNccl(const BrokenNccl&) = delete;
  BrokenNccl& operator=(const BrokenNccl&) = delete;

 private:
  int device_;
};

/// What the host has issued on all devices of this process, captured work included.
struct Issued {
  uint64_t kernels, copies;  ///< copies: fills, too
};
Issued issued();

/// One recording of an event.
struct Recording {
  std::mutex mutex;
  std::condition_variable changed;
  int device = 0;
  bool complete = false;
  std::chrono::steady_clock::time_point time;
  Graph* graph = nullptr;  // recorded in a capture
};

struct Event {
  std::atomic<std::shared_ptr<Recording>> last;  // null: never recorded

  std::shared_ptr<Recording> recording() { return last.load(); }
  void set(std::shared_ptr<Recording> recording) { last.store(std::move(recording)); }
};

using Work = std::function<void(FiberPool&)>;

/// What was captured, in the order of the calls, which is one that all dependencies allow.
struct Graph {
  std::vector<Work> work;
};

class Stream {
 public:
  explicit Stream(int device);
  void enqueue(Work work);
  /// Blocks until nothing is left to do.
  void synchronize();
  /// What is enqueued is still done.
  void close();
  void work_off();
  bool idle();
  int device() const { return device_; }
  Graph* graph = nullptr;  // not null while capturing

 private:
  int device_;
  Random random_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  bool busy_ = false, closed_ = false;
};

/// The stream, or the default stream of the current device.
Stream& resolve(cudaStream_t stream);
cudaError_t enqueue_grid(const cudaLaunchConfig_t& config, std::function<void()> kernel,
                         size_t args_bytes, size_t most_shared_bytes);
/// Dynamic shared memory that cudaFuncSetAttribute has allowed the kernel on the current device.
size_t& shared_bytes_allowed(const void* kernel);

}  // namespace epcomm::sim
