// A warp that moves rows, one after another, from memory that this GPU loads to several places that
// it stores to: pieces of a row go through shared memory by bulk copies, several pieces under way.
// Without bulk copies (before sm_90) rows go through registers.
//
// Memory order: the rows are there when move() is called; the caller has put a fence between an
// acquire and the first bulk load after it. After finish() all stores are written, for a release by
// whichever thread a barrier orders after it.
#pragma once

#include "kernels/device.cuh"
#include "kernels/rows.cuh"

namespace epcomm {

/// How rows are cut, and how many warps of a block move them; the host and the kernel agree on it.
struct MoverShape {
  int32_t warps;
  int32_t pieces;       // of a row
  int32_t piece_bytes;  // the last may be shorter
  int32_t row_bytes;
};

class RowMover {
 public:
  static constexpr int kStages = 4;  ///< pieces that a warp has under way
  static constexpr int kMaxWarps = 8;
  static constexpr int kMaxPieceBytes = 16 << 10;

  /// Where the pieces of each stage go, by lane. In shared memory, for each warp.
  using Targets = char* [kStages][kWarpSize];

  /// By a warp. loaded: kStages barriers; stages: dynamic shared memory of shared_bytes() / warps.
  __device__ __forceinline__ RowMover(const MoverShape& shape, BulkBarrier* loaded, char* stages,
                                      Targets& targets)
      : shape_(shape), loaded_(loaded), stages_(stages), targets_(targets) {
    if constexpr (kHasBulkCopies) {
      if (lane_index() == 0)
        for (int s = 0; s < kStages; ++s) barrier_init(loaded_ + s);
      fence_barrier_init();
      __syncwarp();
    }
  }
  /// The row at `from`, the same in all lanes, goes to `to` of each lane; null = nowhere.
  __device__ __forceinline__ void move(const char* from, char* to) {
    if constexpr (kHasBulkCopies) {
      for (int piece = 0; piece < shape_.pieces; ++piece) {
        const int at = piece * shape_.piece_bytes;
        if (loaded_pieces_ - stored_pieces_ == kStages - 1) store_oldest();
        const int s = loaded_pieces_ % kStages;
        if (loaded_pieces_ >= kStages) {
          // All but the newest piece that was stored have been read: one of them was in this stage.
          bulk_wait_read<1>();
          __syncwarp();
        }
        targets_[s][lane_index()] = to == nullptr ? nullptr : to + at;
        if (lane_index() == 0) {
          barrier_expect(loaded_ + s, bytes_of(piece));
          bulk_load(stage(s), from + at, bytes_of(piece), loaded_ + s);
        }
        ++loaded_pieces_;
      }
    } else {
      through_registers(from, to);
    }
  }
  /// Until everything that was moved is written.
  __device__ __forceinline__ void finish() {
    if constexpr (kHasBulkCopies) {
      while (stored_pieces_ < loaded_pieces_) store_oldest();
      bulk_wait_written();
      fence_global_for_bulk();
    }
  }

 private:
  __device__ __forceinline__ char* stage(int s) const { return stages_ + s * shape_.piece_bytes; }
  __device__ __forceinline__ uint32_t bytes_of(int piece) const {
    return static_cast<uint32_t>(
        min(shape_.piece_bytes, shape_.row_bytes - piece * shape_.piece_bytes));
  }
  __device__ __forceinline__ void store_oldest() {
    const int s = stored_pieces_ % kStages;
    barrier_wait(loaded_ + s, static_cast<uint32_t>(stored_pieces_ / kStages) & 1);
    char* to = targets_[s][lane_index()];
    if (to != nullptr) bulk_store(to, stage(s), bytes_of(stored_pieces_ % shape_.pieces));
    bulk_commit();
    ++stored_pieces_;
  }
  __device__ __forceinline__ void through_registers(const char* from, char* to) {
    const int vectors = shape_.row_bytes / kVectorBytes;
    const uint32_t lanes = __ballot_sync(kFullWarp, to != nullptr);
    Batch batch;
    for (int at = 0; at < vectors && lanes != 0; at += Batch::kStep) {
      batch.load<RowMemory::kArrived>(from, at + lane_index(), vectors);
      for (uint32_t rest = lanes; rest != 0;) {
        const auto address =
            __shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(to), take_lowest(rest));
        batch.store(reinterpret_cast<char*>(address), at + lane_index(), vectors);
      }
    }
  }

  const MoverShape& shape_;
  BulkBarrier* loaded_;
  char* stages_;
  Targets& targets_;
  int loaded_pieces_ = 0, stored_pieces_ = 0;
};

}  // namespace epcomm
