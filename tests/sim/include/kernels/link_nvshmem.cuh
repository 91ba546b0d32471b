// The link of csrc/kernels/link_nvshmem.cuh on simulated devices, over tests/sim/nic.h. Found
// instead of it by the order of include paths.
#pragma once

#include "kernels/link.cuh"
#include "tests/sim/nic.h"

namespace epcomm {

struct NvshmemLink {
  static constexpr bool kMapped = false;

  static bool reached(const uint64_t* word, uint64_t epoch) {
    return load_acquire_system(word) >= epoch;
  }
  static void signal(const LinkArgs& link, int peer, size_t word, uint64_t epoch) {
    nic(link).signal(link.pe[peer], word, epoch);
  }
  static void put_signal(const LinkArgs& link, int peer, const LinkPiece& piece, size_t word,
                         uint64_t epoch) {
    __syncwarp();
    if (lane_index() == 0)
      nic(link).put_signal(link.pe[peer], piece.to, piece.from, piece.bytes, word, epoch);
  }
  static void quiet(const LinkArgs& link, const sim::Where& where = sim::Where::current()) {
    const uint64_t issued = nic(link).issued();
    while (!nic(link).landed(issued)) sim::grid().poll("quiet", where);
  }

 private:
  static sim::Nic& nic(const LinkArgs& link) { return sim::Nic::of(link.window[link.rank]); }
};

}  // namespace epcomm
