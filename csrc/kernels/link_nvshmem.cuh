// The verbs of a link (kernels/link.cuh) in terms of NVSHMEM's public device API. The only header
// of device code that includes NVSHMEM's.
//
// All addresses that go to NVSHMEM are of this rank's own window, which lies in the symmetric heap
// at one offset on all ranks; the PE says whose is meant.
//
// Memory order: a put with signal delivers the signal after what it puts. Puts of several threads
// of a block are issued after a barrier and a fence at system scope. reached() asks NVSHMEM, which
// sees to it that what came before the signal is visible where a network card brought it.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "kernels/link.cuh"

namespace epcomm {

struct NvshmemLink {
  static constexpr bool kMapped = false;

  static __device__ __forceinline__ bool reached(const uint64_t* word, uint64_t epoch) {
    if (load_acquire_system(word) < epoch) return false;
    return nvshmem_uint64_test(const_cast<uint64_t*>(word), NVSHMEM_CMP_GE, epoch) != 0;
  }
  static __device__ __forceinline__ void signal(const LinkArgs& link, int peer, size_t word,
                                                uint64_t epoch) {
    nvshmemx_signal_op(word_at(link, word), epoch, NVSHMEM_SIGNAL_SET, link.pe[peer]);
  }
  static __device__ __forceinline__ void put_signal(const LinkArgs& link, int peer,
                                                    const LinkPiece& piece, size_t word,
                                                    uint64_t epoch) {
    nvshmemx_putmem_signal_nbi_warp(at(link, piece.to), at(link, piece.from), piece.bytes,
                                    word_at(link, word), epoch, NVSHMEM_SIGNAL_SET, link.pe[peer]);
  }
  static __device__ __forceinline__ void quiet(const LinkArgs&) { nvshmem_quiet(); }

 private:
  static __device__ __forceinline__ char* at(const LinkArgs& link, size_t offset) {
    return link.window[link.rank] + offset;
  }
  static __device__ __forceinline__ uint64_t* word_at(const LinkArgs& link, size_t offset) {
    return reinterpret_cast<uint64_t*>(at(link, offset));
  }
};

}  // namespace epcomm
