// What the kernels between nodes share: waiting for what comes along a rail, and putting it.
//
// Memory order: a warp stores what it puts, every lane fences at system scope, and one put with
// signal follows, which delivers the signal after the bytes. Who waits for a chunk acquires its
// signal by one lane; the others are ordered after it by __syncwarp.
#pragma once

#include "kernels/device.cuh"
#include "kernels/link.cuh"
#include "kernels/link_nvshmem.cuh"
#include "kernels/rail.h"

namespace epcomm {

/// What a block knows of the sources that its rank forwards for, in shared memory.
struct RailSources {
  int32_t count;
  int32_t rank[kMaxLinkRanks];

  /// By the whole block; ends with a barrier.
  __device__ __forceinline__ void fill(const RailArgs& args) {
    const int s = thread_index(), rank_ = args.link.rank;
    if (s == 0) count = args.map.num_sources(rank_);
    if (s < args.map.num_ranks && args.map.forwards(rank_, s))
      rank[args.map.source_index(rank_, s)] = s;
    __syncthreads();
  }
};

/// A chunk of an area, of which number and rows are the same in all lanes of a warp.
struct RailChunk {
  int32_t area, number;
  int32_t begin, end;  ///< rows

  __device__ __forceinline__ RailChunk(const Chunks& chunks, int area_, int number_, int total)
      : area(area_),
        number(number_),
        begin(static_cast<int32_t>(chunks.begin(number_))),
        end(static_cast<int32_t>(chunks.end(number_, total))) {}
  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

__device__ __forceinline__ const uint64_t* rail_word(const RailArgs& args, size_t offset) {
  return reinterpret_cast<const uint64_t*>(args.link.window[args.link.rank] + offset);
}

__device__ __forceinline__ void rail_lost(const RailArgs& args) {
  atomicExch(&args.link.state->lost, 1u);
}

/// Waits, as a warp, for a chunk that source puts. False in all lanes if it was given up.
__device__ __forceinline__ bool rail_arrived(const RailArgs& args, uint64_t epoch, int source,
                                             int area, int chunk) {
  bool there = true;
  if (lane_index() == 0) {
    there = wait_signal<NvshmemLink>(args.link, source,
                                     rail_word(args, args.rail.signal(area, chunk)), epoch);
    if constexpr (kHasBulkCopies) fence_global_for_bulk();
    if (!there) rail_lost(args);
  }
  return __all_sync(kFullWarp, there) != 0;
}

/// Puts `bytes` from offset `from` of this rank's window to offset `to` of peer's, with the signal
/// of a chunk of an area there. By a warp, which has stored what is put.
__device__ __forceinline__ void rail_put(const RailArgs& args, uint64_t epoch, int peer,
                                         const LinkPiece& piece, size_t signal) {
  fence_system();
  __syncwarp();
  NvshmemLink::put_signal(args.link, peer, piece, signal, epoch);
}

}  // namespace epcomm
