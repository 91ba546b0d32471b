// Every byte offset of the library: the control area of a window, the two blocks of a plan, and the
// metadata that travels with a token. Used alike by sizing, transports, kernels and tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "epcomm/types.h"

#ifdef __CUDACC__
#define EPCOMM_HOST_DEVICE __host__ __device__
#else
#define EPCOMM_HOST_DEVICE
#endif

namespace epcomm {

/// Bytes of a line, in the sense of bulk copies: one whose two ends lie differently within a line
/// is split in each. Across NVLink such copies took up to 1.6 times as long.
constexpr int kBulkLine = 128;

constexpr size_t kBlockAlignment = 128;  ///< bytes; every array of a block starts on one

EPCOMM_HOST_DEVICE constexpr size_t align_up(size_t value, size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

/// The sizes that offsets depend on.
struct Dims {
  int32_t num_ranks = 0;
  int32_t num_experts = 0;
  int32_t local_experts = 0;
  int32_t topk = 0;
  bool device = false;    ///< plans also hold what kernels on a GPU need
  int32_t num_nodes = 0;  ///< plans also hold what forwarding needs; 0 = nothing is forwarded
};

constexpr int kMaxChunks = 8;  ///< pieces that a batch is sent in

/// What a rank announces when it routes, in 4-byte words: a header, then chunk counts, then counts.
struct AnnounceLayout {
  // Header words.
  static constexpr int kNumTokens = 0;  ///< T of the source
  static constexpr int kBadIndex =
      1;  ///< 1 + position (t * K + k) of the first bad expert id, 0 = none
  static constexpr int kBadValue = 2;   ///< that id (clamped to int32)
  static constexpr int kSignature = 3;  ///< first of kSignatureWords: what all ranks must do alike
  static constexpr int kSignatureWords = 8;
  static constexpr int kHeaderWords = 12;

  int num_ranks, num_experts;
  EPCOMM_HOST_DEVICE int chunk_count(int c) const {
    return kHeaderWords + c * num_ranks;
  }  ///< [R], c < kMaxChunks
  EPCOMM_HOST_DEVICE int rank_count() const {
    return kHeaderWords + kMaxChunks * num_ranks;
  }  ///< [R]
  EPCOMM_HOST_DEVICE int expert_count() const { return rank_count() + num_ranks; }  ///< [E]
  EPCOMM_HOST_DEVICE int words() const {
    return static_cast<int>(align_up(static_cast<size_t>(expert_count() + num_experts), 4));
  }
};

/// Send block of a plan: offsets of the arrays of PlanView that route fills.
struct PlanSendLayout {
  size_t topk_idx, row, slot, rank_count, expert_count, expert_offset, tokens_per_expert, num_recv;
  size_t announced, first_row;   ///< empty unless Dims::device
  size_t node_slot, node_count;  ///< empty unless Dims::num_nodes
  size_t node_token;             ///< empty unless both
  size_t forwarded;              ///< of forwarded_words
  size_t bytes;

  EPCOMM_HOST_DEVICE PlanSendLayout(const Dims& d, int64_t num_tokens,
                                    int64_t forwarded_words = 0) {
    size_t at = 0;
    auto take = [&at](int64_t count) {
      size_t offset = at;
      at = align_up(at + static_cast<size_t>(count) * sizeof(int32_t), kBlockAlignment);
      return offset;
    };
    topk_idx = take(num_tokens * d.topk);
    row = take(num_tokens * d.topk);
    slot = take(num_tokens * d.num_ranks);
    rank_count = take(int64_t{d.num_ranks} * d.num_ranks);
    expert_count = take(int64_t{d.num_ranks} * d.num_experts);
    expert_offset = take(d.local_experts + 1);
    tokens_per_expert = take(d.local_experts);
    num_recv = take(1);
    announced = take(
        d.device ? int64_t{d.num_ranks} * AnnounceLayout{d.num_ranks, d.num_experts}.words() : 0);
    first_row = take(d.device ? num_tokens * d.num_ranks : 0);
    node_slot = take(num_tokens * d.num_nodes);
    node_count = take(int64_t{d.num_ranks} * d.num_nodes);
    node_token = take(d.device ? num_tokens * d.num_nodes : 0);
    forwarded = take(forwarded_words);
    bytes = at;
  }
};

/// Fills the send half of a PlanView from the start of its block.
inline void set_send_block(PlanView& view, void* block, const PlanSendLayout& layout) {
  auto at = [block](size_t offset) {
    return reinterpret_cast<int32_t*>(static_cast<char*>(block) + offset);
  };
  view.topk_idx = at(layout.topk_idx);
  view.row = at(layout.row);
  view.slot = at(layout.slot);
  view.rank_count = at(layout.rank_count);
  view.expert_count = at(layout.expert_count);
  view.expert_offset = at(layout.expert_offset);
  view.tokens_per_expert = at(layout.tokens_per_expert);
  view.num_recv = at(layout.num_recv);
  view.announced = at(layout.announced);
  view.first_row = at(layout.first_row);
  view.node_slot = at(layout.node_slot);
  view.node_count = at(layout.node_count);
  view.node_token = at(layout.node_token);
  view.forwarded = at(layout.forwarded);
}

/// Metadata of one received token, written by its source rank. A plan's receive block is an array
/// of these records, one per received token, in the order of the tokens. In 4-byte words:
///   [0, K)      row: row of the receiver's layout that carries (token, k), -1 = expert elsewhere
///   [K, 2K)     topk_idx: global expert ids
///   [2K, 3K)    topk_weights: float
///   [3K]        token: its index on the source rank
struct MetaLayout {
  int32_t topk;
  size_t record_bytes;

  EPCOMM_HOST_DEVICE explicit MetaLayout(int topk_)
      : topk(topk_), record_bytes(align_up((3 * static_cast<size_t>(topk_) + 1) * 4, 16)) {}

  EPCOMM_HOST_DEVICE int32_t* row(void* block, int64_t n) const {
    return reinterpret_cast<int32_t*>(static_cast<char*>(block) +
                                      static_cast<size_t>(n) * record_bytes);
  }
  EPCOMM_HOST_DEVICE int32_t* topk_idx(void* block, int64_t n) const {
    return row(block, n) + topk;
  }
  EPCOMM_HOST_DEVICE float* topk_weights(void* block, int64_t n) const {
    return reinterpret_cast<float*>(row(block, n) + 2 * topk);
  }
  EPCOMM_HOST_DEVICE int32_t* token(void* block, int64_t n) const {
    return row(block, n) + 3 * topk;
  }
};

/// A value with the epoch in which it was written, in one word of 8 bytes: whoever reads the word
/// knows whether it has come, and needs no signal. It carries the lower half of the epoch: only a
/// word that was left from exactly 2^32 calls before would be taken for a new one.
struct TaggedWord {
  EPCOMM_HOST_DEVICE static constexpr uint64_t of(uint64_t epoch, uint32_t value) {
    return epoch << 32 | value;
  }
  EPCOMM_HOST_DEVICE static constexpr bool is_of(uint64_t word, uint64_t epoch) {
    return static_cast<uint32_t>(word >> 32) == static_cast<uint32_t>(epoch);
  }
};

/// Where the link puts: what goes out of a slot of a small batch, in one word.
struct SlotWord {
  EPCOMM_HOST_DEVICE static constexpr uint64_t of(int32_t expert, uint32_t weight) {
    return static_cast<uint64_t>(weight) << 32 | static_cast<uint32_t>(expert);
  }
  EPCOMM_HOST_DEVICE static constexpr uint32_t weight(uint64_t word) {
    return static_cast<uint32_t>(word >> 32);
  }
};

/// Control area at the start of every rank's window, on transports whose peers store into it: a
/// header, then one inbox per source rank, then the memory that allocate() hands out. An inbox is
/// the signals of its source, two briefs and two entries (what the source announces when it enters
/// a call; alternating by the parity of the epoch), the latter followed by the counts that routing
/// announces: int32 tokens to each rank, to each expert, to each node (where rows are forwarded).
/// Where the link puts, the same place takes the slots that go out with the entry of a small batch:
/// an entry and what is behind it are one message.
struct ControlLayout {
  static constexpr size_t kHeaderBytes = 128;
  static constexpr size_t kSignalBytes = 128;
  static constexpr size_t kBriefBytes = 128;
  static constexpr size_t kEntryBytes = 256;

  size_t num_counts;
  size_t entry_bytes;  ///< one entry with its counts
  size_t inbox_bytes;
  size_t arena;  ///< offset of allocatable memory in the window

  /// slots_bytes: room behind an entry for slots of a small batch.
  EPCOMM_HOST_DEVICE explicit ControlLayout(const Dims& d, size_t slots_bytes = 0) {
    const AnnounceLayout announcement{d.num_ranks, d.num_experts};
    num_counts = d.device ? static_cast<size_t>(announcement.words())
                          : static_cast<size_t>(d.num_ranks + d.num_experts + d.num_nodes);
    const size_t counts_bytes = num_counts * sizeof(int32_t);
    entry_bytes = align_up(kEntryBytes + (counts_bytes > slots_bytes ? counts_bytes : slots_bytes),
                           kBlockAlignment);
    inbox_bytes = kSignalBytes + 2 * (kBriefBytes + entry_bytes);
    arena = align_up(kHeaderBytes + inbox_bytes * static_cast<size_t>(d.num_ranks), 4096);
  }
  /// Offset in the window of the inbox that source writes.
  EPCOMM_HOST_DEVICE size_t inbox(int source) const {
    return kHeaderBytes + static_cast<size_t>(source) * inbox_bytes;
  }
  /// TaggedWord [kBriefBytes / 8]: the part of an entry that is read without waiting for a signal.
  EPCOMM_HOST_DEVICE size_t brief(int source, uint64_t epoch) const {
    return inbox(source) + kSignalBytes + (epoch & 1) * kBriefBytes;
  }
  EPCOMM_HOST_DEVICE size_t entry(int source, uint64_t epoch) const {
    return inbox(source) + kSignalBytes + 2 * kBriefBytes + (epoch & 1) * entry_bytes;
  }
  /// int32 [num_counts]; on a GPU the whole announcement (AnnounceLayout).
  EPCOMM_HOST_DEVICE size_t counts(int source, uint64_t epoch) const {
    return entry(source, epoch) + kEntryBytes;
  }
  /// SlotWord [T, K], where the link puts and the call is of a small batch: dispatch: expert ids of
  /// source's tokens, -1 = none, and their weights, if any; combine: weights.
  EPCOMM_HOST_DEVICE size_t slots(int source, uint64_t epoch) const {
    return counts(source, epoch);
  }
};

/// How far the rows of a dispatch have come: in every rank's window, a word per source rank and
/// block of it that sends rows. Each word is written by that block alone and only grows, from call
/// to call and within a call: a wait asks for "at least".
struct ArrivalLayout {
  static constexpr int kMaxSenders = 32;  ///< blocks of a source that send
  static constexpr int kCountBits = 24;
  static constexpr int32_t kAll = (1 << kCountBits) - 1;  ///< a count: all rows of the call

  size_t begin, end;  ///< offsets in the window

  EPCOMM_HOST_DEVICE ArrivalLayout(int num_ranks, size_t begin_)
      : begin(align_up(begin_, kBlockAlignment)),
        end(begin + static_cast<size_t>(num_ranks) * kMaxSenders * sizeof(uint64_t)) {}
  EPCOMM_HOST_DEVICE size_t word(int source, int sender) const {
    return begin + static_cast<size_t>(source * kMaxSenders + sender) * sizeof(uint64_t);
  }
  /// What a word holds when, of the first count tokens that its source sends to the word's rank,
  /// the block has stored its part.
  EPCOMM_HOST_DEVICE static constexpr uint64_t signal(uint64_t epoch, int32_t count) {
    return epoch << kCountBits | static_cast<uint64_t>(count < kAll ? count : kAll - 1);
  }
  EPCOMM_HOST_DEVICE static constexpr uint64_t signal_all(uint64_t epoch) {
    return epoch << kCountBits | static_cast<uint64_t>(kAll);
  }
  /// The count that a word holds, of a call: 0 = nothing yet.
  EPCOMM_HOST_DEVICE static constexpr int32_t count(uint64_t word, uint64_t epoch) {
    if (word >> kCountBits != epoch) return word >> kCountBits > epoch ? kAll : 0;
    return static_cast<int32_t>(word & kAll);
  }
};

/// The pieces that a row is put in, where the link puts: each has a signal of its own. The sender's
/// entry says how many it wants (LinkEntry::pieces).
struct RowPieces {
  static constexpr int kMost = 4;
  static constexpr int32_t kLeastBytes = 1024, kAlignment = 128;

  int32_t bytes;  ///< of the row, its scales included
  int32_t count, step;

  EPCOMM_HOST_DEVICE RowPieces(int32_t bytes_, int32_t wanted) : bytes(bytes_), count(kMost) {
    if (count > wanted) count = wanted;
    if (count > bytes / kLeastBytes) count = bytes / kLeastBytes;
    if (count < 1) count = 1;
    step = static_cast<int32_t>(
        align_up(static_cast<size_t>((bytes + count - 1) / count), size_t{kAlignment}));
  }
  EPCOMM_HOST_DEVICE int32_t begin(int i) const { return i * step; }
  EPCOMM_HOST_DEVICE int32_t end(int i) const { return i + 1 < count ? (i + 1) * step : bytes; }
  /// Whether piece i, of any number, has some of the bytes [from, to).
  EPCOMM_HOST_DEVICE bool holds(int i, int32_t from, int32_t to) const {
    return i < count && begin(i) < to && from < end(i);
  }
};

/// Where the rows of small batches wait for their receiver, in every rank's window, and the signals
/// that say that they are there. Each part has a slot per source rank; all but the signals
/// alternate by the parity of the epoch.
struct SmallLayout {
  /// Token (or row) i of a batch belongs to share i % kShares. A share has a signal of its own, its
  /// number; or, where the link puts, row i has signal i, with a word for each of its pieces.
  static constexpr int kShares = 128, kSignals = 256;
  /// Every 4 bytes of a staged row, before somebody writes it and after its receiver has read it:
  /// a word that differs has come. One that does not has come when the row's signal says so.
  static constexpr uint32_t kUnwritten = 0xf7f7f7f7;

  size_t signals, ids, weights, rows;  ///< offsets in the window
  size_t outbox;                       ///< see outbox_row
  size_t end;
  size_t row_bytes;  ///< of a staged row, its scales included
  size_t slots_step,
      rows_step;  ///< from the ids (or weights), and the rows, of a source to the next's
  int32_t num_ranks, max_tokens, topk;
  int32_t signal_words;  ///< of a signal

  /// From offset `begin` on; widest_row is a multiple of kRowAlignment. puts: with an outbox, but
  /// without ids and weights (ControlLayout::slots).
  EPCOMM_HOST_DEVICE SmallLayout(const Dims& d, int max_tokens_, size_t widest_row, size_t begin,
                                 bool puts = false)
      : row_bytes(widest_row),
        num_ranks(d.num_ranks),
        max_tokens(max_tokens_),
        topk(d.topk),
        signal_words(puts ? RowPieces::kMost : 1) {
    const size_t ranks = static_cast<size_t>(num_ranks), tokens = static_cast<size_t>(max_tokens);
    signals = align_up(begin, kBlockAlignment);
    ids = align_up(signals + ranks * signals_bytes(), kBlockAlignment);
    slots_step = puts ? 0 : slots_bytes(max_tokens, topk);
    rows_step = tokens * row_bytes;
    weights = ids + 2 * ranks * slots_step;
    rows = weights + 2 * ranks * slots_step;
    outbox = rows + 2 * ranks * rows_step;
    end = outbox + (puts ? ranks * rows_step : 0);
  }
  /// For epoch 0 alone, and without signals: what is from one source lies together, in rows_step
  /// bytes from source_ids on, so that one all-gather moves it.
  static SmallLayout gathered(const Dims& d, int max_tokens, size_t widest_row) {
    SmallLayout all(d, max_tokens, widest_row, 0);
    all.signals = all.ids = 0;
    all.weights = slots_bytes(max_tokens, d.topk);
    all.rows = 2 * all.weights;
    all.slots_step = all.rows_step = align_up(all.rows + all.rows_step, kBlockAlignment);
    all.outbox = all.end = static_cast<size_t>(d.num_ranks) * all.rows_step;
    return all;
  }
  /// Of the words of all slots of a rank.
  EPCOMM_HOST_DEVICE static size_t slots_bytes(int max_tokens, int topk) {
    return align_up(static_cast<size_t>(max_tokens) * static_cast<size_t>(topk) * sizeof(uint64_t),
                    kBlockAlignment);
  }
  /// Of the signals of a rank.
  EPCOMM_HOST_DEVICE size_t signals_bytes() const {
    return size_t{kSignals} * static_cast<size_t>(signal_words) * sizeof(uint64_t);
  }
  /// uint64: epoch of the last call in which the rows of this signal, or this piece of its row,
  /// were stored by source.
  EPCOMM_HOST_DEVICE size_t signal(int source, int i, int piece = 0) const {
    return signals + static_cast<size_t>(source) * signals_bytes() +
           static_cast<size_t>(i * signal_words + piece) * sizeof(uint64_t);
  }
  /// TaggedWord [max_tokens, K]: expert ids of source's tokens; -1 = none.
  EPCOMM_HOST_DEVICE size_t source_ids(int source, uint64_t epoch) const {
    return ids + slot(source, epoch) * slots_step;
  }
  /// TaggedWord [T, K]: weights of source's tokens, fp32.
  EPCOMM_HOST_DEVICE size_t source_weights(int source, uint64_t epoch) const {
    return weights + slot(source, epoch) * slots_step;
  }
  /// Dispatch: token t of source, then its scales. Combine: the partial row of source for this
  /// rank's token t.
  EPCOMM_HOST_DEVICE size_t row(int source, uint64_t epoch, int64_t t) const {
    return rows + slot(source, epoch) * rows_step + static_cast<size_t>(t) * row_bytes;
  }
  /// Combine, where the link puts: the partial row for the i-th token that this rank has received
  /// from rank owner, before it is put.
  EPCOMM_HOST_DEVICE size_t outbox_row(int owner, int64_t i) const {
    return outbox +
           (static_cast<size_t>(owner) * static_cast<size_t>(max_tokens) + static_cast<size_t>(i)) *
               row_bytes;
  }

 private:
  EPCOMM_HOST_DEVICE size_t slot(int source, uint64_t epoch) const {
    return (epoch & 1) * static_cast<size_t>(num_ranks) + static_cast<size_t>(source);
  }
};

}  // namespace epcomm
