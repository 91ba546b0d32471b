// Memory that lies at one place in the symmetric heaps of all processes of a job, handed out in
// pieces to groups of them.
//
// Taking symmetric memory is collective over the whole job, and so is giving it back. Buffers come
// and go over any part of the job, so memory is taken in large slabs, never given back, and the
// ranks of a Buffer agree among themselves on a piece of a slab that is free on all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "epcomm/bootstrap.h"

namespace epcomm {

class SymmetricHeap {
 public:
  /// Collective over all processes of the job; null if one of them has no room.
  using Take = std::function<char*(size_t bytes)>;

  SymmetricHeap(int num_pes, Take take) : num_pes_(num_pes), take_(std::move(take)) {}

  class Piece {
   public:
    Piece(SymmetricHeap& heap, size_t slab, size_t first, size_t units)
        : heap_(heap), slab_(slab), first_(first), units_(units) {}
    Piece(const Piece&) = delete;
    Piece& operator=(const Piece&) = delete;
    /// The memory can be used again, by groups that hold all processes of this one.
    ~Piece();
    char* data() const;
    /// Processes of the group may still write here: the memory is not used again.
    void abandon() { abandoned_ = true; }

   private:
    SymmetricHeap& heap_;
    size_t slab_, first_, units_;
    bool abandoned_ = false;
  };

  /// Collective over a group; pes: of its ranks, in order. The content is whatever it was. When
  /// nothing suffices and the group is the whole job, takes a slab of at least slab_bytes. Throws
  /// the same Error on all ranks if there is no room.
  std::unique_ptr<Piece> allocate(Bootstrap& group, const std::vector<int>& pes, size_t bytes,
                                  size_t slab_bytes);

 private:
  using Users = std::vector<int>;  // sorted
  struct Unit {
    bool used = false;
    std::shared_ptr<const Users> users;  // the last; null = none yet
  };
  struct Slab {
    char* data;
    std::vector<Unit> units;
  };
  // As a number, so that groups can compare: slab, then unit.
  struct Place {
    uint64_t slab, unit;
  };
  Place first_fit(Place from, size_t units, const Users& group) const;
  bool agree(Bootstrap& group, const Users& users, size_t units, Place& place) const;
  void take_slab(Bootstrap& group, size_t bytes);

  const int num_pes_;
  const Take take_;
  mutable std::mutex mutex_;  // guards what follows, while no other rank is waited for
  std::vector<Slab> slabs_;
};

}  // namespace epcomm
