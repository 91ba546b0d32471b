// The rows of small batches in staging: how those who send say that they are there, and how those
// who receive take them out.
//
// Memory order: staging is kUnwritten (SmallLayout) between calls. Rows are stored in words of 4
// bytes or more, and a receiver polls the words themselves: one that is not kUnwritten is what the
// sender has stored, and nothing else has to be ordered with it. The receiver makes it kUnwritten
// again before its kernel ends, and the next sender knows of that end (kernels/small.h). Where a
// row holds kUnwritten itself, or staging is not clean, its signal decides: the threads of a block
// store rows, meet at a barrier, then one thread per (share, rank) releases the signal at system
// scope, which covers the whole block; each lane that reads the rows then has acquired it, or is
// ordered by __syncwarp after one that has.
//
// A link that puts (kernels/link.cuh) has the rows stored into this rank's own window, from where
// the warps of the block put each to the ranks that get it, with a signal. Where a put is a copy by
// the warp that calls it, and there are more warps than rows, several of them put a piece of a row
// each, with a signal each; a network card gets few, long messages.
#pragma once

#include "kernels/device.cuh"
#include "kernels/link.cuh"
#include "kernels/rows.cuh"
#include "kernels/small.cuh"
#include "kernels/statistics.cuh"
#include "kernels/token_layout.h"

namespace epcomm {

/// That a rank puts a row for rank `to` in, at most; entry: of the former.
__device__ __forceinline__ int pieces_for(const LinkEntry& entry, int to) {
  return (entry.cut_for >> to & 1) != 0 ? entry.pieces : 1;
}

/// The signal of row i of source, or of one of its pieces, in this rank's window: its share's, or
/// its own where the link puts.
template <class Link>
__device__ __forceinline__ const uint64_t* row_signal(const LinkArgs& link,
                                                      const SmallLayout& small, int source, int i,
                                                      int piece = 0) {
  static_assert(SmallLayout::kSignals >= kTileTokens);
  const int signal = Link::kMapped ? i % SmallLayout::kShares : i;
  return reinterpret_cast<const uint64_t*>(link.window[link.rank] +
                                           small.signal(source, signal, piece));
}

/// Puts this block's rows, as signal_shares says. The warps take what is next to be put as they
/// come: rows go to more or fewer ranks.
template <class Link, class Rows, class Piece>
__device__ __forceinline__ void put_rows(const LinkArgs& link, const SmallLayout& small,
                                         uint64_t epoch, const BlockRows& own, Rows rows,
                                         Piece piece) {
  EPCOMM_SHARED(int32_t, taken);
  if (thread_index() == 0) taken = 0;
  __syncthreads();
  fence_system();  // what the block has stored is read by a network card
  const int most_pieces = link.entry.cut_for != 0 ? link.entry.pieces : 1;
  const int of_row = link.num_ranks * most_pieces;
  int most_rows = 0;
#pragma unroll 1
  for (int r = 0; r < link.num_ranks; ++r) most_rows = max(most_rows, rows(r));
  const int all = own.count_of(most_rows) * of_row;
  for (;;) {
    int next = 0;
    if (lane_index() == 0) next = atomicAdd(&taken, 1);
    next = __shfl_sync(kFullWarp, next, 0);
    if (next >= all) return;
    const int of_own = next / of_row, rest = next - of_own * of_row;
    const int row = own.at(of_own), nth = rest / most_pieces, i = rest - nth * most_pieces;
    const int peer = (link.rank + 1 + nth) % link.num_ranks;
    if (row >= rows(peer) || i >= pieces_for(link.entry, peer)) continue;
    LinkPiece put = piece(peer, row);
    const RowPieces pieces(static_cast<int32_t>(put.bytes), pieces_for(link.entry, peer));
    if (put.bytes == 0 || i >= pieces.count) continue;
    put.from += static_cast<size_t>(pieces.begin(i));
    put.to += static_cast<size_t>(pieces.begin(i));
    put.bytes = static_cast<uint32_t>(pieces.end(i) - pieces.begin(i));
    link_put_signal<Link>(link, peer, put, small.signal(link.rank, row, i), epoch);
  }
}

/// Says that this block's rows are stored, by all threads; where the link puts, puts each, or each
/// of its pieces, with a signal of its own, so that none must land before another. own: of any
/// number of rows. rows(r) gives how many rows all blocks together send to rank r, piece(r, i)
/// where the i-th of them is (0 bytes = rank r does not get it). Begins with a barrier.
template <class Link, class Rows, class Piece>
__device__ __forceinline__ void signal_shares(const LinkArgs& link, const SmallLayout& small,
                                              uint64_t epoch, const BlockRows& own, Rows rows,
                                              [[maybe_unused]] Piece piece) {
  if constexpr (!Link::kMapped) {
    put_rows<Link>(link, small, epoch, own, rows, piece);
  } else {
    __syncthreads();
#pragma unroll 1
    for (int i = thread_index(); i < own.shares * link.num_ranks; i += kSmallThreads) {
      const int share = own.first + i / link.num_ranks * own.step;
      const int peer = (link.rank + i) % link.num_ranks;
      if (share < rows(peer)) link_signal<Link>(link, peer, small.signal(link.rank, share), epoch);
    }
  }
}

__device__ __forceinline__ bool is_written(const uint4& v) {
  constexpr uint32_t kUnwritten = SmallLayout::kUnwritten;
  return v.x != kUnwritten && v.y != kUnwritten && v.z != kUnwritten && v.w != kUnwritten;
}
__device__ __forceinline__ uint4 unwritten_vector() {
  constexpr uint32_t kUnwritten = SmallLayout::kUnwritten;
  return make_uint4(kUnwritten, kUnwritten, kUnwritten, kUnwritten);
}

/// Makes words [begin, end) of a staged row unwritten, by a warp.
__device__ __forceinline__ void unwrite(char* row, size_t begin, size_t end) {
  auto* words = reinterpret_cast<uint32_t*>(row);
#pragma unroll 1
  for (size_t i = begin + static_cast<size_t>(lane_index()); i < end; i += kWarpSize)
    words[i] = SmallLayout::kUnwritten;
}

/// The bytes [begin, end) of a row that has row_bytes, its scales included.
struct RowPart {
  int32_t row_bytes, begin, end;
};

/// Rows of staging, taken out as they arrive. All functions by a whole warp; false in all lanes if
/// a wait was given up.
template <class Link>
struct StagedRows {
  const LinkArgs& link;
  const SmallLayout& small;
  uint64_t epoch;
  bool clean;              ///< LinkState::clean
  const LinkEntry* entry;  ///< where the link puts: LinkCall::entry

  /// Where the link puts: waits for a part of row i of source, each of its pieces by a lane of its
  /// own; what these have acquired all lanes may load.
  __device__ __forceinline__ bool arrived(int source, int i, const RowPart& part) const {
    const int piece = lane_index();
    return all_there(piece >= RowPieces::kMost ||
                     piece_arrived(source, i, piece, part, piece == 0));
  }
  /// The same of rows of several sources, of a lane each; lanes that need none pass i < 0.
  __device__ __forceinline__ bool arrived_each(int source, int i, const RowPart& part) const {
    const bool cut = __any_sync(
        kFullWarp,
        i >= 0 && RowPieces(part.row_bytes, pieces_for(entry[source], link.rank)).count > 1);
    const int lanes = cut ? RowPieces::kMost : 1;  // for a row
    const uint32_t asking = __ballot_sync(kFullWarp, i >= 0);
    bool there = true;
    for (int first = 0; first < kWarpSize && asking >> first != 0; first += kWarpSize / lanes) {
      const int asker = first + lane_index() / lanes, piece = lane_index() % lanes;
      const int s = __shfl_sync(kFullWarp, source, asker), n = __shfl_sync(kFullWarp, i, asker);
      if (n >= 0) there &= piece_arrived(s, n, piece, part, piece == 0);
    }
    return all_there(there);
  }

  __device__ __forceinline__ char* row(int source, int64_t t) const {
    return link.window[link.rank] + small.row(source, epoch, t);
  }

  /// Until what load() loads is there. load() loads, and says whether the lane has found nothing
  /// unwritten; source, i: of the row (of this lane's), as in arrived(). probe: a word of it
  /// that is stored late, of some lanes, null of others. Only these words are polled: all that is
  /// waited for would keep the memory from those who send.
  template <class Load>
  __device__ __forceinline__ bool wait(int source, int i, const uint32_t* probe, Load load) const {
    const int first = __shfl_sync(kFullWarp, source, 0);
    const bool notes = lane_index() == 0 || source != first;
    uint64_t begin = 0, end = 0;
    bool told = i < 0, all_told = false;
    for (int spin = 1;; ++spin) {
      const bool come = spin == 1 || all_told || probe == nullptr ||
                        load_relaxed_system(probe) != SmallLayout::kUnwritten;
      if (__all_sync(kFullWarp, come)) {
        const bool there = load() && clean;
        if (__all_sync(kFullWarp, there) || all_told) break;
      }
      if (begin == 0) begin = global_time_ns();
      if (!told && (told = Link::reached(row_signal<Link>(link, small, source, i), epoch)))
        end = global_time_ns();
      // What one lane has acquired others load.
      __syncwarp();
      all_told = __all_sync(kFullWarp, told);
      if (spin % kSpinsPerLook == 0 && __any_sync(kFullWarp, gives_up(link, epoch, begin))) {
        if (lane_index() == 0) atomicExch(&link.state->lost, 1u);
        return false;
      }
    }
    if (begin != 0 && i >= 0 && notes && link.statistics.max_wait_ns != nullptr)
      note_wait(link.statistics, source, (end != 0 ? end : global_time_ns()) - begin);
    return true;
  }

  /// What a lane takes of a row at a time: the vectors v, v + 32, ... below end_vector at from, and
  /// the words w, w + 32, ... below end_word at words.
  template <int kVectors>
  struct Part {
    static constexpr int kWords = 2, kWordStep = kWords * kWarpSize;
    char *from, *words;
    int v, end_vector, w, end_word;
    BatchOf<kVectors> batch;
    uint32_t word[kWords];

    /// Whether all of it has been written.
    __device__ __forceinline__ bool is_there() const {
      bool there = batch.all(v, end_vector, is_written);
#pragma unroll
      for (int u = 0; u < kWords; ++u)
        there &= w + u * kWarpSize >= end_word || word[u] != SmallLayout::kUnwritten;
      return there;
    }
    /// A word that is stored late.
    __device__ __forceinline__ const uint32_t* last() const {
      if (w - lane_index() < end_word)
        return reinterpret_cast<const uint32_t*>(words) + end_word - 1;
      const int end = min(v - lane_index() + batch.kStep, end_vector);
      return reinterpret_cast<const uint32_t*>(from + int64_t{end} * kVectorBytes) - 1;
    }
    __device__ __forceinline__ void load() {
      batch.template load<RowMemory::kArriving>(from, v, end_vector);
#pragma unroll
      for (int u = 0; u < kWords; ++u)
        load_relaxed_system_if(w + u * kWarpSize < end_word, word[u],
                               reinterpret_cast<const uint32_t*>(words) + w + u * kWarpSize);
    }
    __device__ __forceinline__ void unwrite() {
      BatchOf<kVectors>::fill(from, v, end_vector, unwritten_vector());
#pragma unroll
      for (int u = 0; u < kWords; ++u)
        if (const int n = w + u * kWarpSize; n < end_word)
          reinterpret_cast<uint32_t*>(words)[n] = SmallLayout::kUnwritten;
    }
  };

  /// Takes a part of source's row i that has been loaded once, early: it may have come meanwhile.
  template <int kVectors>
  __device__ __forceinline__ bool take(int source, int i, Part<kVectors>& part) const {
    if constexpr (!Link::kMapped) {
      part.load();
    } else {
      bool loaded = true;
      const bool taken = wait(source, i, part.last(), [&] {
        if (!loaded) part.load();
        loaded = false;
        return part.is_there();
      });
      if (!taken) return false;
      part.unwrite();
    }
    return true;
  }

  /// Makes staging clean where it was not: what no call has taken. taken(s, t) gives the bytes of
  /// source s's row t that this one takes. By all warps of a team.
  template <class Taken>
  __device__ __forceinline__ void clean_up(const SmallTeam& team, int num_ranks,
                                           Taken taken) const {
    const int rows = Link::kMapped && !clean ? num_ranks * small.max_tokens : 0;
#pragma unroll 1
    for (int j = team.spread_warp(); j < rows; j += team.warps()) {
      const int s = j / small.max_tokens, t = j - s * small.max_tokens;
      unwrite(row(s, t), taken(s, t) / sizeof(uint32_t), small.row_bytes / sizeof(uint32_t));
    }
  }

  // By one lane: until a piece of row i has come, if it has something of the part. notes: as in
  // wait_signal.
  __device__ __forceinline__ bool piece_arrived(int source, int i, int piece, const RowPart& part,
                                                bool notes) const {
    const RowPieces pieces(part.row_bytes, pieces_for(entry[source], link.rank));
    return !pieces.holds(piece, part.begin, part.end) ||
           wait_signal<Link>(link, source, row_signal<Link>(link, small, source, i, piece), epoch,
                             notes);
  }
  __device__ __forceinline__ bool all_there(bool there) const {
    __syncwarp();
    if (__all_sync(kFullWarp, there)) return true;
    if (lane_index() == 0) atomicExch(&link.state->lost, 1u);
    return false;
  }
};

}  // namespace epcomm
