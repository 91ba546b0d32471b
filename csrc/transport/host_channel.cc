#include "transport/host_channel.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "core/call_fields.h"
#include "core/clock.h"

namespace epcomm {

// Written by one source rank only; lies in the window of the rank that reads it.
struct HostChannel::Inbox {
  std::atomic<uint64_t> stage[kNumStages];  // Chunks::signal of the newest
  std::atomic<uint64_t> fault_epoch;        // not 0: the source gave up on fault_rank
  std::atomic<int32_t> fault_rank;
  std::atomic<int32_t> fault_operation;
};

// In front of the inboxes. The doorbell counts signals of any source, so that one futex serves all
// waits.
struct HostChannel::Header {
  std::atomic<uint32_t> doorbell;
  std::atomic<uint32_t> waiters;
  std::atomic<int64_t> seen_ns;  // when the owner was last at work in a call, or waiting in one
};

namespace {

static_assert(std::atomic<uint64_t>::is_always_lock_free &&
                  std::atomic<uint32_t>::is_always_lock_free,
              "signals are shared between processes");

// How often a waiting rank looks for dead peers and faults.
constexpr int kSliceMs = 20;

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected, int timeout_ms) {
  const timespec timeout{timeout_ms / 1000, timeout_ms % 1000 * 1'000'000L};
  ::syscall(SYS_futex, &word, FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

int32_t value_of(const CallSignature& s, CallField field) {
  switch (field) {
    case CallField::kOperation:
      return static_cast<int32_t>(s.operation);
    case CallField::kLayout:
      return static_cast<int32_t>(s.layout);
    case CallField::kDtype:
      return static_cast<int32_t>(s.dtype);
    case CallField::kQuant:
      return static_cast<int32_t>(s.quant);
    case CallField::kTopk:
      return s.topk;
    case CallField::kAlignment:
      return s.expert_alignment;
    case CallField::kRowBytes:
      return s.row_bytes;
    case CallField::kScaleBytes:
      return s.scale_bytes;
    case CallField::kWeighted:
      return s.weighted;
    case CallField::kRows:
      return s.by_token;
    case CallField::kHostSync:
      return 0;  // ranks may differ: the counts are always known here
    case CallField::kPlan:
      return s.plan;
  }
  return 0;
}

}  // namespace

HostChannel::HostChannel(Bootstrap& bootstrap, Window& window, const Dims& dims, double timeout_s)
    : window_(window),
      layout_(dims),
      rank_(bootstrap.rank()),
      num_ranks_(bootstrap.size()),
      timeout_s_(timeout_s) {
  static_assert(sizeof(Inbox) <= ControlLayout::kSignalBytes);
  static_assert(sizeof(Header) <= ControlLayout::kHeaderBytes);
}

HostChannel::Inbox& HostChannel::inbox(int owner, int source) const {
  return *reinterpret_cast<Inbox*>(window_.peer(owner) + layout_.inbox(source));
}

HostChannel::Header& HostChannel::header(int owner) const {
  return *reinterpret_cast<Header*>(window_.peer(owner));
}

const Entry& HostChannel::entry(int peer) const {
  return *reinterpret_cast<const Entry*>(window_.peer(rank_) + layout_.entry(peer, epoch_));
}

const int32_t* HostChannel::counts(int peer) const {
  return reinterpret_cast<const int32_t*>(window_.peer(rank_) + layout_.counts(peer, epoch_));
}

void HostChannel::begin(Operation operation) {
  operation_ = operation;
  show_up();
  check_faults();
  ++epoch_;
}

void HostChannel::enter_all(const Entry& entry, const int32_t* counts) {
  for (int i = 0; i < num_ranks_; ++i) {
    const int peer = (rank_ + i) % num_ranks_;
    char* window = window_.peer(peer);
    std::memcpy(window + layout_.entry(rank_, epoch_), &entry, sizeof entry);
    if (counts != nullptr)
      std::memcpy(window + layout_.counts(rank_, epoch_), counts,
                  layout_.num_counts * sizeof(int32_t));
    signal(peer, Stage::kEntered);
  }
  wait_all(Stage::kEntered);

  for (int f = 0; f < kCallFields; ++f) {
    const auto field = static_cast<CallField>(f);
    std::vector<int32_t> values;
    for (int r = 0; r < num_ranks_; ++r)
      values.push_back(value_of(this->entry(r).signature, field));
    check_call_field(field, values);
  }
  for (int r = 0; r < num_ranks_; ++r) {
    const Entry& theirs = this->entry(r);
    if (theirs.full != 0) throw WindowFull(r, theirs.needed_bytes, theirs.free_bytes);
  }
}

void HostChannel::signal(int peer, Stage stage, int32_t chunks) {
  show_up();
  // Release: covers all that was written for peer up to here; paired with the acquire in reached().
  inbox(peer, rank_)
      .stage[static_cast<int>(stage)]
      .store(Chunks::signal(epoch_, chunks), std::memory_order_release);
  ring(peer);
}

bool HostChannel::reached(int source, Stage stage, int32_t chunks) const {
  return inbox(rank_, source).stage[static_cast<int>(stage)].load(std::memory_order_acquire) >=
         Chunks::signal(epoch_, chunks);
}

void HostChannel::ring(int peer) {
  Header& h = header(peer);
  // Sequentially consistent, as in wait_until(): either the waiter sees the new count or we see the
  // waiter.
  h.doorbell.fetch_add(1, std::memory_order_seq_cst);
  if (h.waiters.load(std::memory_order_seq_cst) != 0) futex_wake_all(h.doorbell);
}

void HostChannel::wait_all(Stage stage) {
  std::vector<int> missing(static_cast<size_t>(num_ranks_));
  std::iota(missing.begin(), missing.end(), 0);
  const int64_t begin = monotonic_ns();
  wait_until(
      [&] {
        std::erase_if(missing, [&](int r) {
          if (!reached(r, stage)) return false;
          if (max_wait_ns_ != nullptr)
            max_wait_ns_[r] = std::max(max_wait_ns_[r], monotonic_ns() - begin);
          return true;
        });
        return missing.empty();
      },
      stage);
}

// last: what every rank signals to every other when it can no longer hold up this wait.
void HostChannel::wait_until(const std::function<bool()>& ready, Stage last) {
  // A few turns without sleeping: often the signal is there, or its sender only needs this core.
  for (int spin = 0; spin < 4; ++spin) {
    if (ready()) return;
    ::sched_yield();
  }
  const Deadline deadline(timeout_s_);
  Header& own = header(rank_);
  for (;;) {
    show_up();
    own.waiters.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t rung = own.doorbell.load(std::memory_order_seq_cst);
    const bool there = ready();
    if (!there) futex_wait(own.doorbell, rung, deadline.left_ms(kSliceMs));
    own.waiters.fetch_sub(1, std::memory_order_relaxed);
    if (there || ready()) return;
    check_faults();
    for (int peer = 0; peer < num_ranks_; ++peer) {
      // Dead first, then silent: it may have signalled as its last act.
      if (!window_.alive(peer) && !reached(peer, last))
        give_up(peer, "its process ended or its Buffer was destroyed");
    }
    if (deadline.passed()) give_up(longest_unseen(last), "it did not answer within the timeout");
  }
}

void HostChannel::show_up() {
  // Relaxed: covers no other data.
  header(rank_).seen_ns.store(monotonic_ns(), std::memory_order_relaxed);
}

// A rank may be late only because it waits for the one that holds all up. Whoever waits shows up
// every slice, so the culprit is the one not seen for longest. It is among the ranks that have not
// signalled `last`: it has not signalled all ranks of its step, hence nobody of a later one.
int HostChannel::longest_unseen(Stage last) const {
  int longest = -1;
  int64_t oldest = 0;
  for (int peer = 0; peer < num_ranks_; ++peer) {
    if (peer == rank_ || reached(peer, last)) continue;
    const int64_t seen = header(peer).seen_ns.load(std::memory_order_relaxed);
    if (longest >= 0 && seen >= oldest) continue;
    longest = peer;
    oldest = seen;
  }
  return longest;
}

void HostChannel::check_faults() {
  for (int source = 0; source < num_ranks_; ++source) {
    const Inbox& box = inbox(rank_, source);
    const uint64_t epoch = box.fault_epoch.load(std::memory_order_acquire);
    if (epoch == 0) continue;
    const int lost = box.fault_rank.load(std::memory_order_relaxed);
    const auto operation =
        static_cast<Operation>(box.fault_operation.load(std::memory_order_relaxed));
    if (lost == rank_) throw Evicted(source, operation, epoch);
    throw PeerLost(lost, operation, epoch,
                   source == rank_ ? "this Buffer lost it in an earlier call"
                                   : "rank " + std::to_string(source) + " reported it");
  }
}

void HostChannel::give_up(int peer, const char* why) {
  for (int r = 0; r < num_ranks_; ++r) {
    Inbox& box = inbox(r, rank_);
    box.fault_rank.store(peer, std::memory_order_relaxed);
    box.fault_operation.store(static_cast<int32_t>(operation_), std::memory_order_relaxed);
    // Release: covers the two words above; paired with the acquire in check_faults().
    box.fault_epoch.store(epoch_, std::memory_order_release);
    ring(r);
  }
  throw PeerLost(peer, operation_, epoch_, why);
}

}  // namespace epcomm
