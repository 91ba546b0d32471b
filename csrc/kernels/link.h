// Host entry points of the kernels that move rows between GPUs which load and store each other's
// memory, and what they share: control words in the windows, and what a call tells its peers.
//
// A collective call has an epoch, counted on the device so that a CUDA graph can replay it. A rank
// *enters* a call by writing a LinkEntry (and, when it routes, its announcement) into its inbox in
// every window, then it signals `entered`; it signals `done` to a peer when it will not touch that
// peer's memory any more in this call. Nobody writes to a rank before that rank has entered: the
// work that used its memory before lies ahead of the call on its stream (small batches go
// elsewhere: kernels/small.h). Entries alternate between two slots by the parity of the epoch: a
// source is at most one call ahead.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "epcomm/types.h"
#include "kernels/kernels.h"
#include "kernels/mark.h"
#include "kernels/token_layout.h"

namespace epcomm {

constexpr int kMaxLinkRanks = 32;  ///< one lane of a warp per rank

/// What a rank announces when it enters a call. Offsets are in its own window.
struct alignas(16) LinkEntry {
  static constexpr int kSignatureWords = 12;
  int32_t signature[kSignatureWords];  ///< what all ranks must do alike; by CallField
  int32_t pushed;                      ///< combine: not 0 = this rank stores its rows into the
                                       ///< owners' staging; 0 = they load them
  int32_t index_bytes;                 ///< dispatch: of an id in recv_topk_idx, 4 or 8
  int32_t num_tokens;                  ///< dispatch of a small batch: tokens of this rank
  int32_t short_rows;                  ///< dispatch: received rows that the memory does not hold
  int32_t senders;                     ///< blocks that say how far the rows that they store have
                                       ///< come; 0 = `pushed` says that all have
  int32_t bad_index, bad_value;        ///< dispatch of a small batch for which the host waits: 1 +
                                       ///< position of the first expert id that does not exist, and
                                       ///< the id; 0 = none
  int32_t pieces;     ///< small batch, where the link puts: that rows go to the ranks of cut_for
                      ///< in, at most (RowPieces); to others they go whole
  uint32_t cut_for;   ///< one bit each
  uint64_t rows;      ///< dispatch: recv_x; combine: x
  uint64_t scales;    ///< dispatch: recv_scales
  uint64_t meta;      ///< dispatch: recv_meta
  uint64_t topk_idx;  ///< dispatch: recv_topk_idx of layout kToken; 0 = not in the window
  uint64_t topk_weights;  ///< dispatch: recv_topk_weights of layout kToken; 0 = not in the window
  uint64_t needed_bytes;  ///< not 0 = no room for the result
  uint64_t free_bytes;
};
static_assert(sizeof(LinkEntry) % 16 == 0 && sizeof(LinkEntry) <= ControlLayout::kEntryBytes);

/// What of an entry can be had at once (ControlLayout::brief): its signature, and these words.
struct LinkBrief {
  static constexpr int kNumTokens = LinkEntry::kSignatureWords;
  static constexpr int kTroubled = kNumTokens + 1;  ///< not 0: the whole entry says what is wrong
  static constexpr int kWords = kTroubled + 1;
};
static_assert(LinkBrief::kWords * sizeof(uint64_t) <= ControlLayout::kBriefBytes);

/// Written by one source rank only; lies in the window of the rank that reads it.
struct LinkInbox {
  uint64_t entered;  ///< epoch of the newest entry, with what is behind it
  uint64_t pushed;   ///< epoch of the last combine of which all partial rows are stored here
  uint64_t done;     ///< epoch of the last call in which the source has left this rank's memory
};
static_assert(sizeof(LinkInbox) <= ControlLayout::kSignalBytes);

/// Of one rank, in its device memory. Kernels of one call run one after another.
struct alignas(64) LinkState {
  // What every block reads as it begins, in one line of memory.
  uint64_t epoch;     ///< of the last call that ended
  uint64_t marks[2];  ///< calls begun, calls ended, whether LinkArgs::progress was told or not
  uint32_t lost;      ///< not 0: a wait was given up; nothing is sent or waited for any more
  uint32_t blocks;    ///< of kernels that end silently (kernels/link_brief.cuh) before this one
  uint32_t started;   ///< blocks of the running kernel that have a number (LinkCall::block)
  uint32_t pieces;    ///< of the running kernel, that its warps have come for
  /// By the parity of the epoch: not 0 = staging for small batches is all SmallLayout::kUnwritten
  /// between calls, since the call of this epoch. It is not at first, and not after a call that was
  /// refused.
  uint32_t clean[2];
  uint32_t taken[kMaxLinkRanks];  ///< received tokens of each source, likewise; a combine in which
                                  ///< rows arrive: [0], parts of tokens
  uint32_t route_refused;         ///< not 0: the last exchange was refused, or given up
  // Counted while blocks begin and end, so not in the first line.
  uint32_t arrived;  ///< blocks of the running kernel that have no more to do; of a small batch
                     ///< that is put, also how many of them have lost or refused it (link_leave);
                     ///< of one that is stored, blocks that have begun
  uint32_t left;     ///< as `blocks`, those that have no more to do, also of the running kernel
  uint64_t refused;  ///< epoch of the last call refused by kernels that end silently
};

/// In pinned host memory: what kernels tell the host and are told by it.
struct LinkReport {
  uint64_t abort;    ///< set by the host: waits end at once
  uint64_t entered;  ///< token of the newest call that all ranks have entered, refused or not
  uint64_t refused;  ///< epoch of the first call, not yet raised, that all ranks refused
  LinkEntry entry[kMaxLinkRanks];  ///< the entries of that call
};

/// A rank's end of the link, as kernels get it.
struct LinkArgs {
  int32_t rank, num_ranks;
  /// Every rank's window, by its address here; null where this GPU cannot load and store it.
  char* window[kMaxLinkRanks];
  int32_t pe[kMaxLinkRanks];  ///< NVSHMEM's number of each rank; other links leave it 0
  ControlLayout control = ControlLayout(Dims{});
  LinkState* state;
  LinkReport* report;
  ProgressWords* progress;
  uint64_t timeout_ns;
  uint64_t token;  ///< of the call, for LinkReport::entered; 0 = not told
  Statistics statistics;
  LinkEntry entry;
};

/// The beginning of a call between GPUs that load and store each other's memory, for a kernel that
/// knows nothing of the link and is launched next.
void launch_enter(const LinkArgs& link, cudaStream_t stream);

/// Of a dispatch that is launched ahead of its counts: what the memory that was announced holds.
/// What this rank receives may not fit.
struct GuessedRoom {
  const int32_t* tokens;    ///< received tokens; null: launched behind the counts
  const int32_t* rows_end;  ///< received rows of layout kExpert; else null
  int32_t token_capacity, row_capacity;
};

/// The data phase of a dispatch, with its beginning and end. Each row is read once and written
/// once per destination rank, into the first of its rows there, with its record and, where the
/// receiver has announced them, its entries of recv_topk_idx and recv_topk_weights. Layouts in
/// which a token may have several rows: copied to the others as they arrive.
struct SendArgs {
  LinkArgs link;
  Dims dims;
  RowSpec rows;
  int32_t num_tokens;
  const char* x;
  const char* scales;
  /// Not kNone: x holds [T, hidden] of x_dtype, which is quantised on the way; rows says what
  /// arrives. Needs bulk copies.
  Quant quant;
  Dtype x_dtype;
  int32_t hidden;
  const float* global_scale;  ///< kNvfp4: [1]
  const float* topk_weights;  ///< null: weights of the records are left unwritten
  bool records;               ///< metadata records are written, not kept from an earlier dispatch
  DeviceExperts experts;
  PlanView plan;
  const int32_t* first_row;  ///< [T, R]: row at rank r that is written, -1 = not sent there
  GuessedRoom room;
  /// What arrives goes from the first row of its token to the others, and ids and weights to the
  /// outputs; source[] of place is unused. The same on all ranks.
  bool places;
  int32_t most_senders;  ///< with `places`: blocks that send, at most ArrivalLayout::kMaxSenders
  PlaceArgs place;
  ArrivalLayout arrivals = ArrivalLayout(0, 0);  ///< in all ranks' windows
};
/// Whether this GPU can run launch_send with quant.
bool can_quantise_on_the_way();
/// Uses exactly num_sms SMs. With `places` half of them send, at most most_senders; the others copy
/// what arrives, and the first, too, when they have sent all.
void launch_send(const SendArgs& args, int num_sms, cudaStream_t stream);

/// A combine of one row per received token, with its beginning and end; or the end of one of which
/// partial rows were stored before. The owner of a token loads its rows from the windows of the
/// ranks that have them, or from its own staging where a rank pushes, and sums. A rank whose rows
/// lie outside the window pushes them, as they are, while it sums what has arrived.
struct PullArgs {
  LinkArgs link;
  Dims dims;
  Dtype dtype;
  int32_t hidden;
  int32_t num_tokens;
  int32_t max_tokens;
  bool partials;         ///< this rank has entered already, and stored partial rows, with the
                         ///< weights in them, into the owners' staging, as all ranks have
  const char* own_rows;  ///< not null: this rank's rows, one per received token, are here, and it
                         ///< pushes those of other ranks' tokens
  size_t push_to;        ///< offset in every window of this rank's first staging row
  int32_t most_senders;  ///< blocks that push, at most ArrivalLayout::kMaxSenders
  ArrivalLayout arrivals = ArrivalLayout(0, 0);  ///< in all ranks' windows
  const char* staging;                           ///< row i of rank r's at r * max_tokens + i
  PlanView plan;
  const float* topk_weights;  ///< [T, K], or null
  DeviceExperts experts;
  const void* bias;  ///< [T, hidden], or null
  void* out;         ///< [T, hidden]
};
/// Uses exactly num_sms SMs. Where rows are pushed half of them do that, at most most_senders; the
/// others sum from the start, and the first, too, when they have pushed all. The formula of
/// Buffer::combine.
void launch_pull(const PullArgs& args, int num_sms, cudaStream_t stream);

}  // namespace epcomm
