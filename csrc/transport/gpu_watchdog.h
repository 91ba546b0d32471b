// Bounds the waits of GPU transports: kernels that wait for a peer cannot raise, so a thread
// watches the progress of the stream from the host, eager calls and graph replays alike.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "core/clock.h"
#include "epcomm/bootstrap.h"
#include "epcomm/error.h"
#include "epcomm/window.h"
#include "kernels/mark.h"
#include "transport/gpu_memory.h"

namespace epcomm {

/// Each call marks its begin and its end on the stream. If a call has begun and does not end within
/// the timeout, failed() says that the connection broke, or the process of a peer is gone, the
/// watchdog calls abort once (it must make the waiting kernels leave) and from then on check()
/// throws PeerLost.
///
/// On one machine ranks tell each other their progress through a small shared window, so that the
/// rank that holds the others up can be named; across machines PeerLost::rank is -1.
class GpuWatchdog {
 public:
  /// Collective.
  GpuWatchdog(Bootstrap& bootstrap, double timeout_s, std::function<void()> abort,
              std::function<bool()> failed);
  ~GpuWatchdog();

  /// The words that count calls begun and ended (kernels/mark.h).
  uint64_t* progress() const { return words_.as<uint64_t>(); }
  /// The marks of a call: before it first waits for a peer, and when nothing of it does any more.
  Mark begin_mark(Operation operation) const { return mark(0, operation); }
  Mark end_mark(Operation operation) const { return mark(1, operation); }
  /// This rank cannot go on: its peers raise PeerLost that names it. Aborts.
  void abandon(const std::string& why);
  /// Throws PeerLost if a peer was lost, Evicted if the peers gave this rank up.
  void check() const;
  /// The same of calls that have ended on the stream: were they complete? A peer that gave somebody
  /// up left its part unfinished, and NCCL, aborted there, can have told this rank otherwise.
  /// Across machines nobody says so.
  void confirm();
  /// Blocks the host until the event is complete. Throws as check() when a peer is lost meanwhile.
  void wait(cudaEvent_t event);
  /// Blocks until this rank's calls, and those of the peers that this rank took part in, have
  /// ended; at most one timeout for the own calls and one second for the others.
  void drain() const;

 private:
  struct Progress;
  struct Fault {
    int rank;     // the lost peer
    int by_rank;  // who said so
    Operation operation;
    uint64_t epoch;
    std::string why;
  };
  bool faulty() const;
  bool hear_peers();
  void watch();
  void publish() const;
  void raise_fault(int rank, const std::string& why, int by_rank = -1);
  int latecomer(uint64_t begun) const;
  int dead_peer() const;
  uint64_t begun() const {
    return std::atomic_ref(words_.as<uint64_t>()[0]).load(std::memory_order_acquire);
  }
  uint64_t ended() const {
    return std::atomic_ref(words_.as<uint64_t>()[1]).load(std::memory_order_acquire);
  }

  int rank_, num_ranks_;
  double timeout_s_;
  std::function<void()> abort_;
  std::function<bool()> failed_;
  Mark mark(int which, Operation operation) const {
    return {progress() + which, counts_.as<uint64_t>() + which, operation};
  }
  PinnedMemory words_;   // [0] begun, [1] ended; written by the GPU
  DeviceMemory counts_;  // what begin_mark and end_mark have counted
  std::unique_ptr<Window>
      window_;  // one Progress per rank, in that rank's piece; null across machines
  mutable std::mutex mutex_;
  std::optional<Fault> fault_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace epcomm
