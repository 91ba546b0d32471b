#include "transport/gpu_watchdog.h"

#include <chrono>
#include <utility>

#include "core/fd_exchange.h"

namespace epcomm {
namespace {

constexpr auto kPeriod = std::chrono::milliseconds(5);
// A peer may exit right after its last call; let ours finish. A connection may break before a peer
// is seen to be dead.
constexpr double kGraceS = 0.3;
constexpr double kDrainPeersS = 1.0;
constexpr double kMarkS = 1.0;  // for a mark that is on the stream to be made
constexpr char kBroke[] = "the connection to it broke";
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
      words_(sizeof(ProgressWords)),
      counts_(2 * sizeof(uint64_t)) {
  if (on_one_machine(bootstrap)) window_ = make_host_window(bootstrap, 4096, timeout_s);
  thread_ = std::thread([this] { watch(); });
}

GpuWatchdog::~GpuWatchdog() {
  stop_ = true;
  thread_.join();
}

void GpuWatchdog::check() {
  // A kernel that has ended so looks as if it had not waited.
  if (load(progress()->gave_up) != 0)
    raise_fault(latecomer(progress_count(begun())), "it did not answer within twice the timeout");
  std::lock_guard lock(mutex_);
  if (!fault_) return;
  if (fault_->rank == rank_ && fault_->by_rank == rank_)
    throw Error(
        "this rank gave its Buffer up in " + std::string(operation_name(fault_->operation)) +
        " (epoch " + std::to_string(fault_->epoch) + "): " + fault_->why +
        "; its peers raise PeerLost that names it, and this Buffer cannot be used any more");
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

// Of a call that ends silently: as far as is known.
uint64_t GpuWatchdog::ended_count() const {
  const uint64_t word = begun(), count = progress_count(word);
  if ((word & kEndsSilently) == 0) return progress_count(load(progress()->ended));
  return silent_.load(std::memory_order_acquire) >= count ? count : count - 1;
}

void GpuWatchdog::drain() const {
  const Deadline own(timeout_s_);
  while (progress_count(begun()) != ended_count() && !own.passed() && !faulty())
    std::this_thread::sleep_for(kPeriod);
  if (window_ == nullptr || faulty()) return;
  publish();
  const Deadline others(kDrainPeersS);
  for (int r = 0; r < num_ranks_; ++r) {
    const auto& theirs = *reinterpret_cast<const Progress*>(window_->peer(r));
    while (theirs.ended.load(std::memory_order_acquire) < ended_count() && window_->alive(r) &&
           !others.passed())
      std::this_thread::sleep_for(kPeriod);
  }
}

void GpuWatchdog::publish() const {
  auto& mine = *reinterpret_cast<Progress*>(window_->peer(rank_));
  mine.begun.store(progress_count(begun()), std::memory_order_release);
  mine.ended.store(ended_count(), std::memory_order_release);
}

// The rank furthest behind a call that this rank has begun; -1 if none is behind.
int GpuWatchdog::latecomer(uint64_t begun) const {
  if (window_ == nullptr) return -1;
  int late = -1;
  uint64_t least = begun;
  for (int r = 0; r < num_ranks_; ++r) {
    if (r == rank_) continue;  // may not have published yet
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
  uint64_t last = begun(), told = load(progress()->waits);
  Deadline deadline(timeout_s_);
  Deadline grace(kGraceS);  // since a peer was first seen to be dead, or a connection broken
  bool in_grace = false;
  Deadline look(kGraceS);  // since the last look
  while (!stop_) {
    std::this_thread::sleep_for(kPeriod);
    const uint64_t now = begun(), count = progress_count(now);
    const uint64_t waits = load(progress()->waits);
    const bool begins = now != last, held_up = look.passed();
    look = Deadline(kGraceS);
    // If this thread was held up, what was told may be old: the call may have ended since.
    const bool tells = std::exchange(told, waits) != waits && !held_up;
    last = now;
    bool under_way = count != progress_count(load(progress()->ended));
    if ((now & kEndsSilently) != 0) {
      under_way = tells && is_wait_of(waits, count);
      if (!begins && !held_up && !under_way) silent_.store(count, std::memory_order_release);
      if (under_way) silent_.store(count - 1, std::memory_order_release);
    }
    if (window_ != nullptr) publish();
    if (begins) {
      deadline = Deadline(timeout_s_);
      in_grace = false;
    }
    if (begins || !under_way) continue;
    // First: who has lost a rank and gone may look lost itself.
    if (hear_peers()) return;
    const int dead = dead_peer();
    if (dead >= 0 || failed_()) {
      if (!std::exchange(in_grace, true)) grace = Deadline(kGraceS);
      if (grace.passed())
        return raise_fault(
            dead >= 0 ? dead : latecomer(count),
            dead >= 0 ? "its process ended or its Buffer was destroyed" : std::string(kBroke));
    }
    if (deadline.passed())
      return raise_fault(latecomer(count), "it did not answer within the timeout");
  }
}

void GpuWatchdog::abandon(const std::string& why) { raise_fault(rank_, why, rank_); }

void GpuWatchdog::lose_connection(const std::string& said) {
  // So that the fault names the call, not the one before. None is made while a graph is captured.
  const Deadline marked(kMarkS);
  while (progress_count(begun()) == ended_count() && !marked.passed())
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  // NCCL's connections can break before it shows whose process ended; a rank that only comes late
  // is not to blame for that.
  const Deadline grace(kGraceS);
  bool known = hear_peers();
  int dead = dead_peer();
  for (; !known && dead < 0 && !grace.passed(); known = hear_peers(), dead = dead_peer())
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (!known)
    raise_fault(dead >= 0 ? dead : latecomer(progress_count(begun())),
                std::string(kBroke) + " (" + said + ")");
  check();
}

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
