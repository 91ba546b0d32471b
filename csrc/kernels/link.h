// Host entry points of the kernels that move rows between GPUs which load and store each other's
// memory, and what they share: control words in the windows, and what a call tells its peers.
//
// A collective call has an epoch, counted on the device so that a CUDA graph can replay it. A rank
// *enters* a call by writing a LinkEntry (and, when it routes, its announcement) into its inbox in
// every window, then it signals `entered`; it signals `done` to a peer when it will not touch that
// peer's memory any more in this call. Nobody writes to a rank before that rank has entered: the
// work that used its memory before lies ahead of the call on its stream. Entries alternate between
// two slots by the parity of the epoch: a source is at most one call ahead.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "epcomm/types.h"
#include "kernels/kernels.h"
#include "kernels/token_layout.h"

namespace epcomm {

constexpr int kMaxLinkRanks = 32;  ///< one lane of a warp per rank

/// What all ranks must do alike in one call, in this order.
enum LinkField : int {
  kFieldOperation,
  kFieldLayout,
  kFieldDtype,
  kFieldTopk,
  kFieldAlignment,
  kFieldRowBytes,
  kFieldScaleBytes,
  kFieldWeighted,
  kFieldHostSync,
  kFieldPlan,   ///< of a dispatch or combine: number of the route that made its plan
  kFieldInput,  ///< of a combine: LinkInput
  kLinkFields
};

/// Where the rows that a combine returns lie.
enum LinkInput : int32_t {
  kInputElsewhere = 1,  ///< anywhere: this rank stores them into the owners' staging rows
  kInputInWindow = 2,   ///< in this rank's window: the owners load them
};

/// What a rank announces when it enters a call. Offsets are in its own window.
struct LinkEntry {
  int32_t signature[14];  ///< [kLinkFields], the rest 0
  uint64_t rows;          ///< dispatch: recv_x; combine: x
  uint64_t scales;        ///< dispatch: recv_scales
  uint64_t meta;          ///< dispatch: recv_meta
  uint64_t needed_bytes;  ///< not 0 = no room for the result
  uint64_t free_bytes;
};
static_assert(kLinkFields <= 14 && sizeof(LinkEntry) % 16 == 0 &&
              sizeof(LinkEntry) <= ControlLayout::kEntryBytes);

/// Written by one source rank only; lies in the window of the rank that reads it.
struct LinkInbox {
  uint64_t entered;  ///< epoch of the newest entry
  uint64_t done;     ///< epoch of the last call in which the source has left this rank's memory
};
static_assert(sizeof(LinkInbox) <= ControlLayout::kSignalBytes);

/// Of one rank, in its device memory. Kernels of one call run one after another.
struct LinkState {
  uint64_t epoch;    ///< of the last call that ended
  uint32_t arrived;  ///< blocks of the running kernel that have no more to do
  uint32_t lost;     ///< not 0: a wait was given up; nothing is sent or waited for any more
};

/// In pinned host memory: what kernels tell the host and are told by it.
struct LinkReport {
  uint64_t abort;    ///< set by the host: waits end at once
  uint64_t refused;  ///< epoch of the first call, not yet raised, that all ranks refused
  LinkEntry entry[kMaxLinkRanks];  ///< the entries of that call
};

/// A rank's end of the link, as kernels get it.
struct LinkArgs {
  int32_t rank, num_ranks;
  char* window[kMaxLinkRanks];  ///< every rank's window, by its address here
  ControlLayout control;
  LinkState* state;
  LinkReport* report;
  uint64_t* progress;  ///< pinned [2]: calls begun, calls ended; see kernels/mark.h
  uint64_t timeout_ns;
  LinkEntry entry;
};

/// Announces this rank's entry and `words` 4-byte words of announce to all, waits for all, compares
/// what all announce and copies the announcements of all to announced [num_ranks, words]. A whole
/// call. Errors: see LinkState and LinkReport.
void launch_exchange(const LinkArgs& link, const int32_t* announce, int32_t* announced, int words,
                     cudaStream_t stream);

/// The two halves of a call whose rows other kernels move: enter, and wait until all are done.
void launch_enter(const LinkArgs& link, cudaStream_t stream);
void launch_finish(const LinkArgs& link, cudaStream_t stream);

/// The data phase of a dispatch, with its beginning and end. Each row is read once and written
/// once per destination rank, into the first of its rows there.
struct SendArgs {
  LinkArgs link;
  Dims dims;
  RowSpec rows;
  int32_t num_tokens;
  const char* x;
  const char* scales;
  const float* topk_weights;  ///< null: weights of the records are left unwritten
  bool records;               ///< metadata records are written, not kept from an earlier dispatch
  DeviceExperts experts;
  PlanView plan;
  const int32_t* first_row;  ///< [T, R]: row at rank r that is written, -1 = not sent there
};
/// Uses exactly num_sms SMs.
void launch_send(const SendArgs& args, int num_sms, cudaStream_t stream);

/// Combine, with its beginning and end, where every rank's rows are in its window, one row per
/// received token: the owner of a token loads and sums its rows.
struct PullArgs {
  LinkArgs link;
  Dims dims;
  Dtype dtype;
  int32_t hidden;
  int32_t num_tokens;
  const int32_t* slot;        ///< [T, R] row at rank r, -1 = none
  const int32_t* topk_idx;    ///< [T, K]; read with topk_weights
  const float* topk_weights;  ///< [T, K], or null
  DeviceExperts experts;
  const void* bias;  ///< [T, hidden], or null
  void* out;         ///< [T, hidden]
};
/// Uses exactly num_sms SMs. The formula of Buffer::combine.
void launch_pull(const PullArgs& args, int num_sms, cudaStream_t stream);

}  // namespace epcomm
