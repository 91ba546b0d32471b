// What the card has been told to do and has not begun, and what of it may be done next.
//
// Operations to one peer may be done in any order, but none before those that were told before a
// fence have ended. Each has a time before which it is not done.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

namespace softnic {

template <class Operation>
class CardQueue {
 public:
  /// chaos: operations that may be done come in random order, each up to so many ticks of the
  /// caller's clock late; 0 = in the order in which they were told, at once.
  CardQueue(int num_peers, uint64_t chaos, uint64_t seed)
      : chaos_(chaos), random_(seed), fences_(static_cast<size_t>(num_peers), 0) {}

  void add(int peer, const Operation& operation, uint64_t now) {
    const uint64_t late = chaos_ == 0 ? 0 : random_() % chaos_;
    pending_.push_back({operation, peer, fences_[static_cast<size_t>(peer)], now + late});
  }
  /// What is told to this peer from now on begins when what was told before has ended.
  void fence(int peer) { ++fences_[static_cast<size_t>(peer)]; }

  /// Nothing told to this peer is left, but for what the last take() gave.
  bool idle(int peer) const {
    return std::none_of(pending_.begin(), pending_.end(),
                        [&](const Entry& e) { return e.peer == peer; });
  }
  bool empty() const { return pending_.empty(); }

  /// Takes what may be done now, together. To be called again when all of it has ended.
  std::vector<Operation> take(uint64_t now) {
    std::vector<uint64_t> oldest(fences_.size(), std::numeric_limits<uint64_t>::max());
    for (const Entry& e : pending_) {
      uint64_t& least = oldest[static_cast<size_t>(e.peer)];
      least = std::min(least, e.fences);
    }
    std::vector<Operation> taken;
    std::vector<Entry> left;
    for (const Entry& e : pending_) {
      if (e.earliest <= now && e.fences == oldest[static_cast<size_t>(e.peer)])
        taken.push_back(e.operation);
      else
        left.push_back(e);
    }
    pending_ = std::move(left);
    if (chaos_ != 0) std::shuffle(taken.begin(), taken.end(), random_);
    return taken;
  }

 private:
  struct Entry {
    Operation operation;
    int peer;
    uint64_t fences;  // to its peer, told before it
    uint64_t earliest;
  };
  const uint64_t chaos_;
  std::mt19937_64 random_;
  std::vector<uint64_t> fences_;  // [peer]: so far
  std::vector<Entry> pending_;    // in the order told
};

}  // namespace softnic
