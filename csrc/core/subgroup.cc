#include "core/subgroup.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "epcomm/error.h"

namespace epcomm {
namespace {

constexpr int64_t kFinished = -1;

}  // namespace

// An exchange of the whole group has as many bytes as the largest among the subgroups. False if all
// subgroups have finished.
bool SubgroupBootstrap::exchange(const void* in, void* out, int64_t bytes) {
  const auto ranks = static_cast<size_t>(all_.size());
  std::vector<int64_t> sizes(ranks);
  all_.all_gather(&bytes, sizes.data(), sizeof bytes);
  const int64_t most = *std::max_element(sizes.begin(), sizes.end());
  if (most == kFinished) return false;
  const auto stride = static_cast<size_t>(std::max<int64_t>(most, 1));
  std::vector<char> mine(stride), gathered(ranks * stride);
  if (bytes > 0) std::memcpy(mine.data(), in, static_cast<size_t>(bytes));
  all_.all_gather(mine.data(), gathered.data(), stride);
  if (bytes == kFinished) return true;
  for (int r = 0; r < size_; ++r) {
    const auto from = static_cast<size_t>(first_ + r);
    EPCOMM_CHECK(sizes[from] == bytes, "bytes is " + std::to_string(bytes) +
                                           "; other ranks of the subgroup gather " +
                                           std::to_string(sizes[from]));
    std::memcpy(static_cast<char*>(out) + static_cast<size_t>(r) * static_cast<size_t>(bytes),
                gathered.data() + from * stride, static_cast<size_t>(bytes));
  }
  return true;
}

void SubgroupBootstrap::all_gather(const void* in, void* out, size_t bytes) {
  exchange(in, out, static_cast<int64_t>(bytes));
}

void SubgroupBootstrap::finish() {
  while (exchange(nullptr, nullptr, kFinished)) {
  }
}

}  // namespace epcomm
