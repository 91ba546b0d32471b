#include "tests/sim/nic.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <stdexcept>

namespace epcomm::sim {
namespace {

struct Cards {
  std::mutex mutex;
  std::map<const char*, Nic*> all;
};
Cards& cards() {
  static Cards& cards = *new Cards;  // threads of cards may outlive statics
  return cards;
}
std::atomic<uint64_t> total_put_bytes{0}, total_puts{0};

}  // namespace

Nic::Nic(std::vector<char*> window, int pe, uint64_t seed)
    : window_(std::move(window)), pe_(pe), random_(seed) {
  constexpr uint32_t kLateness[] = {0, 30, 400, 2000};
  lateness_us_ = kLateness[random_.below(4)];
  lazy_ = lateness_us_ == 2000;
  {
    std::lock_guard lock(cards().mutex);
    cards().all[window_[static_cast<size_t>(pe_)]] = this;
  }
  thread_ = std::thread([this] { work(); });
}

Nic::~Nic() {
  {
    std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_all();
  thread_.join();
  std::lock_guard lock(cards().mutex);
  cards().all.erase(window_[static_cast<size_t>(pe_)]);
}

Nic& Nic::of(const char* window) {
  std::lock_guard lock(cards().mutex);
  const auto found = cards().all.find(window);
  if (found == cards().all.end()) throw std::logic_error("no window that a card knows");
  return *found->second;
}

void Nic::issue(Operation operation) {
  operation.number = ++issued_;
  operation.earliest = Clock::now();
  if (lazy_)
    operation.earliest += std::chrono::microseconds(lateness_us_);
  else if (lateness_us_ != 0 && random_.one_in(2))
    operation.earliest += std::chrono::microseconds(random_.below(lateness_us_));
  pending_.push_back(operation);
}

void Nic::put_signal(int pe, size_t to, size_t from, size_t bytes, size_t word, uint64_t value) {
  {
    std::lock_guard lock(mutex_);
    total_put_bytes += bytes;
    ++total_puts;
    issue({.pe = pe, .to = to, .from = from, .bytes = bytes});
    issue({.pe = pe, .after = issued_, .to = word, .value = value});
  }
  changed_.notify_all();
}

void Nic::signal(int pe, size_t word, uint64_t value) {
  {
    std::lock_guard lock(mutex_);
    issue({.pe = pe, .to = word, .value = value});
  }
  changed_.notify_all();
}

uint64_t Nic::put_bytes() { return total_put_bytes; }
uint64_t Nic::puts() { return total_puts; }

uint64_t Nic::issued() const {
  std::lock_guard lock(mutex_);
  return issued_;
}

bool Nic::landed(uint64_t issued) {
  std::lock_guard lock(mutex_);
  if (issued > awaited_) {
    awaited_ = issued;
    if (lazy_) changed_.notify_all();
  }
  return std::none_of(pending_.begin(), pending_.end(),
                      [&](const Operation& o) { return o.number <= issued; });
}

bool Nic::may_land(const Operation& operation) const {
  return std::none_of(pending_.begin(), pending_.end(),
                      [&](const Operation& o) { return o.number == operation.after; });
}

void Nic::land(const Operation& operation) {
  char* to = window_[static_cast<size_t>(operation.pe)] + operation.to;
  if (operation.bytes == 0) {
    __atomic_store_n(reinterpret_cast<uint64_t*>(to), operation.value, __ATOMIC_RELEASE);
    return;
  }
  const char* from = window_[static_cast<size_t>(pe_)] + operation.from;
  std::memcpy(to, from, operation.bytes);
}

void Nic::work() {
  std::unique_lock lock(mutex_);
  while (!stopped_) {
    const auto now = Clock::now();
    auto next = now + std::chrono::hours(1);
    std::vector<size_t> ready;
    for (size_t i = 0; i < pending_.size(); ++i) {
      if (!may_land(pending_[i])) continue;
      if (pending_[i].earliest <= now || (lazy_ && pending_[i].number <= awaited_))
        ready.push_back(i);
      else
        next = std::min(next, pending_[i].earliest);
    }
    if (ready.empty()) {
      changed_.wait_until(lock, next);
      continue;
    }
    const size_t at = ready[random_.below(static_cast<uint32_t>(ready.size()))];
    Operation operation = pending_[at];
    // Now and then only a part, the end first.
    if (operation.bytes >= 32 && random_.one_in(3)) {
      const size_t half = operation.bytes / 32 * 16;
      pending_[at].bytes = half;
      operation.to += half;
      operation.from += half;
      operation.bytes -= half;
      land(operation);
      continue;
    }
    land(operation);
    pending_[at] = pending_.back();
    pending_.pop_back();
  }
}

}  // namespace epcomm::sim
