#include "transport/gpu_watchdog.h"

#include <chrono>
#include <utility>

#include "core/fd_exchange.h"

namespace epcomm {
namespace {

constexpr auto kPeriod = std::chrono::milliseconds(5);
constexpr double kDeadPeerGraceS =
    0.3;  // a peer may exit right after its last call; let ours finish
constexpr double kDrainPeersS = 1.0;
constexpr int64_t kGaveUpBase = 2;  // so that an unknown rank, -1, is not 0

}  // namespace

// What a rank shows the others, in its own piece of the window.
struct GpuWatchdog::Progress {
  std::atomic<uint64_t> begun, ended;  // counts
  std::atomic<int64_t> gave_up;        // kGaveUpBase + rank that this rank lost; 0 = none
};

GpuWatchdog::GpuWatchdog(Bootstrap& bootstrap, double timeout_s, std::function<void()> abort,
                         std::function<bool()> failed)
    : rank_(bootstrap.rank()),
      num_ranks_(bootstrap.size()),
      timeout_s_(timeout_s),
      abort_(std::move(abort)),
      failed_(std::move(failed)),
      words_(2 * sizeof(uint64_t)),
      counts_(2 * sizeof(uint64_t)) {
  if (on_one_machine(bootstrap)) window_ = make_host_window(bootstrap, 4096, timeout_s);
  thread_ = std::thread([this] { watch(); });
}

GpuWatchdog::~GpuWatchdog() {
  stop_ = true;
  thread_.join();
}

void GpuWatchdog::check() const {
  std::lock_guard lock(mutex_);
  if (!fault_) return;
  if (fault_->rank == rank_) throw Evicted(fault_->by_rank, fault_->operation, fault_->epoch);
  throw PeerLost(fault_->rank, fault_->operation, fault_->epoch, fault_->why);
}

bool GpuWatchdog::faulty() const {
  std::lock_guard lock(mutex_);
  return fault_.has_value();
}

void GpuWatchdog::wait(cudaEvent_t event) {
  for (int spin = 0;; ++spin) {
    const cudaError_t state = cudaEventQuery(event);
    if (state == cudaSuccess) break;
    if (state != cudaErrorNotReady) check_cuda(state, "cudaEventQuery");
    if (spin > 20'000) std::this_thread::yield();
    if (spin % 256 == 255) check();
  }
  confirm();
}

void GpuWatchdog::confirm() {
  hear_peers();
  check();
}

// Takes over what a peer says of a rank that it has lost. True: there was something.
bool GpuWatchdog::hear_peers() {
  for (int r = 0; window_ != nullptr && r < num_ranks_; ++r) {
    if (r == rank_) continue;
    const int64_t lost = reinterpret_cast<const Progress*>(window_->peer(r))
                             ->gave_up.load(std::memory_order_acquire);
    if (lost == 0) continue;
    raise_fault(static_cast<int>(lost - kGaveUpBase), "another rank reported it", r);
    return true;
  }
  return false;
}

void GpuWatchdog::drain() const {
  const Deadline own(timeout_s_);
  while (progress_count(begun()) != progress_count(ended()) && !own.passed() && !faulty())
    std::this_thread::sleep_for(kPeriod);
  if (window_ == nullptr || faulty()) return;
  publish();
  const Deadline others(kDrainPeersS);
  for (int r = 0; r < num_ranks_; ++r) {
    const auto& theirs = *reinterpret_cast<const Progress*>(window_->peer(r));
    while (theirs.ended.load(std::memory_order_acquire) < progress_count(ended()) &&
           window_->alive(r) && !others.passed())
      std::this_thread::sleep_for(kPeriod);
  }
}

void GpuWatchdog::publish() const {
  auto& mine = *reinterpret_cast<Progress*>(window_->peer(rank_));
  mine.begun.store(progress_count(begun()), std::memory_order_release);
  mine.ended.store(progress_count(ended()), std::memory_order_release);
}

// The rank furthest behind a call that this rank has begun; -1 if none is behind.
int GpuWatchdog::latecomer(uint64_t begun) const {
  if (window_ == nullptr) return -1;
  int late = -1;
  uint64_t least = begun;
  for (int r = 0; r < num_ranks_; ++r) {
    const auto& theirs = *reinterpret_cast<const Progress*>(window_->peer(r));
    const uint64_t count = theirs.begun.load(std::memory_order_acquire);
    if (count >= least) continue;
    least = count;
    late = r;
  }
  return late;
}

int GpuWatchdog::dead_peer() const {
  for (int r = 0; window_ != nullptr && r < num_ranks_; ++r)
    if (!window_->alive(r)) return r;
  return -1;
}

void GpuWatchdog::watch() {
  uint64_t last = begun();
  Deadline deadline(timeout_s_), grace(kDeadPeerGraceS);
  while (!stop_) {
    std::this_thread::sleep_for(kPeriod);
    if (window_ != nullptr) publish();
    const uint64_t now = begun();
    if (now != last || progress_count(now) == progress_count(ended())) {
      last = now;
      deadline = Deadline(timeout_s_);
      grace = Deadline(kDeadPeerGraceS);
      continue;
    }
    // First: who has lost a rank and gone may look lost itself.
    if (hear_peers()) return;
    if (const int dead = dead_peer(); dead >= 0 && grace.passed())
      return raise_fault(dead, "its process ended or its Buffer was destroyed");
    if (failed_()) return raise_fault(latecomer(progress_count(now)), "the connection to it broke");
    if (deadline.passed())
      return raise_fault(latecomer(progress_count(now)), "it did not answer within the timeout");
  }
}

void GpuWatchdog::abandon(const std::string& why) { raise_fault(rank_, why, rank_); }

void GpuWatchdog::raise_fault(int rank, const std::string& why, int by_rank) {
  const uint64_t word = begun();
  {
    std::lock_guard lock(mutex_);
    if (fault_) return;  // the watchdog and a failing call may meet
    fault_ = Fault{rank, by_rank, progress_operation(word), progress_count(word), why};
  }
  if (window_ != nullptr) {
    auto& mine = *reinterpret_cast<Progress*>(window_->peer(rank_));
    mine.gave_up.store(kGaveUpBase + rank, std::memory_order_release);
  }
  abort_();
}

}  // namespace epcomm
