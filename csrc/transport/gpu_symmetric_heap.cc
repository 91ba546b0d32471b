#include "transport/gpu_symmetric_heap.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/vote.h"
#include "epcomm/error.h"
#include "kernels/token_layout.h"

namespace epcomm {
namespace {

constexpr size_t kUnit = 64 << 10;
constexpr uint64_t kNowhere = UINT64_MAX;

}  // namespace

SymmetricHeap::Piece::~Piece() {
  if (abandoned_) return;
  std::lock_guard lock(heap_.mutex_);
  for (size_t i = 0; i < units_; ++i) heap_.slabs_[slab_].units[first_ + i].used = false;
}

char* SymmetricHeap::Piece::data() const {
  std::lock_guard lock(heap_.mutex_);
  return heap_.slabs_[slab_].data + first_ * kUnit;
}

// Memory whose last users are not all in the group stays away from it: one of them may be behind,
// in a call of a Buffer that this process has ended. A group that holds them all has seen the end
// of it on each.
SymmetricHeap::Place SymmetricHeap::first_fit(Place from, size_t units, const Users& group) const {
  std::lock_guard lock(mutex_);
  for (uint64_t s = from.slab; s < slabs_.size(); ++s) {
    const std::vector<Unit>& all = slabs_[s].units;
    size_t run = 0;
    for (size_t u = s == from.slab ? from.unit : 0; u < all.size(); ++u) {
      const Unit& unit = all[u];
      const bool fits = !unit.used && (unit.users == nullptr ||
                                       std::includes(group.begin(), group.end(),
                                                     unit.users->begin(), unit.users->end()));
      run = fits ? run + 1 : 0;
      if (run == units) return {s, u + 1 - units};
    }
  }
  return {kNowhere, 0};
}

// Every rank names the first place that suits it, from the farthest that any has named before,
// until all name the same.
bool SymmetricHeap::agree(Bootstrap& group, const Users& users, size_t units, Place& place) const {
  std::vector<Place> named(static_cast<size_t>(group.size()));
  Place from{0, 0};
  for (;;) {
    const Place mine = first_fit(from, units, users);
    group.all_gather(&mine, named.data(), sizeof mine);
    const auto before = [](const Place& a, const Place& b) {
      return std::pair(a.slab, a.unit) < std::pair(b.slab, b.unit);
    };
    const auto [least, most] = std::minmax_element(named.begin(), named.end(), before);
    if (most->slab == kNowhere) return false;
    place = *most;
    if (!before(*least, *most)) return true;
    from = *most;
  }
}

void SymmetricHeap::take_slab(Bootstrap& group, size_t bytes) {
  char* data = nullptr;
  const auto failures = failures_of(group, [&] {
    data = take_(bytes);
    if (data == nullptr) throw Error("no room in the symmetric heap");
  });
  throw_failures("taking " + std::to_string(bytes) + " bytes of symmetric memory", failures,
                 "set NVSHMEM_SYMMETRIC_SIZE to more, make the Buffer with a smaller window_bytes "
                 "or max_tokens, or free memory of the GPU");
  std::lock_guard lock(mutex_);
  slabs_.push_back({data, std::vector<Unit>(bytes / kUnit)});
}

std::unique_ptr<SymmetricHeap::Piece> SymmetricHeap::allocate(Bootstrap& group,
                                                              const std::vector<int>& pes,
                                                              size_t bytes, size_t slab_bytes) {
  Users users(pes);
  std::sort(users.begin(), users.end());
  const size_t units = align_up(std::max<size_t>(bytes, 1), kUnit) / kUnit;
  Place place{};
  if (!agree(group, users, units, place)) {
    if (group.size() != num_pes_)
      throw Error("this group has " + std::to_string(group.size()) + " of the " +
                  std::to_string(num_pes_) +
                  " ranks that NVSHMEM was initialised with, and needs " + std::to_string(bytes) +
                  " bytes of symmetric memory, which are not free on all of them; only a Buffer "
                  "over all ranks can take more: make that one first, with a larger window_bytes");
    take_slab(group, align_up(std::max(units * kUnit, slab_bytes), kUnit));
    if (!agree(group, users, units, place))
      throw Error("a slab of symmetric memory was taken, but not all ranks have it");
  }
  const auto shared = std::make_shared<const Users>(std::move(users));
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < units; ++i) slabs_[place.slab].units[place.unit + i] = {true, shared};
  return std::make_unique<Piece>(*this, place.slab, place.unit, units);
}

}  // namespace epcomm
