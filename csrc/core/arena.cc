#include "core/arena.h"

#include <algorithm>
#include <iterator>

namespace epcomm {

Arena::Arena(size_t bytes) {
  const size_t usable = bytes / kGranularity * kGranularity;
  if (usable > 0) free_.emplace(0, usable);
}

std::optional<size_t> Arena::allocate(size_t bytes) {
  // A zero-byte request still gets a piece of its own, so that every offset is unique.
  const size_t need = std::max<size_t>((bytes + kGranularity - 1) / kGranularity, 1) * kGranularity;
  std::lock_guard lock(mutex_);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [offset, size] = *it;
    if (size < need) continue;
    free_.erase(it);
    if (size > need) free_.emplace(offset + need, size - need);
    used_.emplace(offset, need);
    return offset;
  }
  return std::nullopt;
}

void Arena::free(size_t offset) {
  std::lock_guard lock(mutex_);
  auto used = used_.find(offset);
  if (used == used_.end()) return;
  size_t begin = used->first, bytes = used->second;
  used_.erase(used);
  auto next = free_.lower_bound(begin);
  if (next != free_.end() && next->first == begin + bytes) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == begin) {
      previous->second += bytes;
      return;
    }
  }
  free_.emplace(begin, bytes);
}

size_t Arena::largest_free() const {
  std::lock_guard lock(mutex_);
  size_t largest = 0;
  for (const auto& [offset, bytes] : free_) largest = std::max(largest, bytes);
  return largest;
}

}  // namespace epcomm
