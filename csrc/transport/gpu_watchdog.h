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

/// Each call marks its begin on the stream, and its end, or, now and then, that it waits
/// (kEndsSilently). If a call has begun and does not end within the timeout, failed() says that the
/// connection broke, or the process of a peer is gone, the watchdog calls abort once (it must make
/// the waiting kernels leave) and from then on check() throws PeerLost.
///
/// On one machine ranks tell each other their progress through a small shared window, so that the
/// rank that holds the others up can be named; across machines PeerLost::rank is -1.
class GpuWatchdog {
 public:
  /// Collective.
  GpuWatchdog(Bootstrap& bootstrap, double timeout_s, std::function<void()> abort,
              std::function<bool()> failed);
  ~GpuWatchdog();

  ProgressWords* progress() const { return words_.as<ProgressWords>(); }
  /// The marks of a call: before it first waits for a peer, and when nothing of it does any more.
  Mark begin_mark(Operation operation) const {
    return {&progress()->begun, counts_.as<uint64_t>(), operation};
  }
  Mark end_mark(Operation operation) const {
    return {&progress()->ended, counts_.as<uint64_t>() + 1, operation};
  }
  /// This rank cannot go on: its peers raise PeerLost that names it. Aborts.
  void abandon(const std::string& why);
  /// The connection to a peer broke, says what this rank was told as it put a call on its stream:
  /// as if the watchdog had found that (failed()), which may not look again in time. Aborts, and
  /// throws what check() does, of the last call that the stream has begun.
  void lose_connection(const std::string& said);
  /// Throws PeerLost if a peer was lost, Evicted if the peers gave this rank up, Error that says
  /// why if it has abandoned a call.
  void check();
  /// The same of calls that have ended on the stream: were they complete? A peer that gave somebody
  /// up left its part unfinished, and NCCL, aborted there, can have told this rank otherwise.
  /// Across machines nobody says so.
  void confirm();
  /// Blocks the host until the event is complete. Throws as check() when a peer is lost meanwhile.
  void wait(cudaEvent_t event);
  /// Blocks until this rank's calls, and those of the peers that this rank took part in, have
  /// ended, or wait no more if they end silently; at most one timeout for the own calls and one
  /// second for the others.
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
  static uint64_t load(uint64_t& word) {
    return std::atomic_ref(word).load(std::memory_order_acquire);
  }
  uint64_t begun() const { return load(progress()->begun); }
  uint64_t ended_count() const;

  int rank_, num_ranks_;
  double timeout_s_;
  std::function<void()> abort_;
  std::function<bool()> failed_;
  PinnedMemory words_;               // ProgressWords
  DeviceMemory counts_;              // what begin_mark and end_mark have counted
  std::atomic<uint64_t> silent_{0};  // calls that have begun and were not seen to wait since
  std::unique_ptr<Window>
      window_;  // one Progress per rank, in that rank's piece; null across machines
  mutable std::mutex mutex_;
  std::optional<Fault> fault_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace epcomm
