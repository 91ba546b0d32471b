// Host entry points of the kernels for small batches: one kernel per call. See docs/nvlink.md,
// "Small batches", and docs/rdma.md.
//
// Rows go to staging memory in the receiver's window at once, without asking: nothing there is in
// use. Staging alternates by the parity of the epoch. A sender in epoch e + 2 has seen every rank
// enter e + 1, and a rank enters e + 1 only after it has read what came in e.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "epcomm/types.h"
#include "kernels/kernels.h"
#include "kernels/link.h"
#include "kernels/token_layout.h"

namespace epcomm {

/// Shared memory that every GPU gives a block: what routing needs of it decides whether batches
/// count as small, and all ranks must decide alike.
constexpr size_t kMaxSmallShared = 94 << 10;
/// What a block of the dispatch needs to route the tokens of all ranks.
size_t small_shared_bytes(const Dims& dims, int max_tokens);

/// A whole dispatch, routing included, or one of its halves.
struct SmallDispatchArgs {
  LinkArgs link;
  SmallLayout small = SmallLayout(Dims{}, 0, 0, 0);
  PlaceArgs place;  ///< where received tokens go; source[] unused
  Phase phase;
  int32_t num_tokens;
  int32_t expert_alignment;
  bool fresh;                   ///< the plan's send block is filled; else it is read
  bool records;                 ///< metadata records are written, not kept from an earlier dispatch
  const void* topk_idx;         ///< fresh: [T, K]
  IndexType index_type;         ///< of topk_idx
  volatile int32_t* bad_index;  ///< as in RouteKernelArgs; null: a bad id goes out with the entry,
                                ///< and all ranks refuse the call
  const char* x;
  const char* scales;
  /// Not kNone: x holds [T, hidden] of x_dtype, which is quantised on the way; place.rows says what
  /// arrives.
  Quant quant;
  Dtype x_dtype;
  int32_t hidden;
  const float* global_scale;  ///< kNvfp4: [1]
  const float* topk_weights;
  /// Null, or pinned host memory [1 + L], for block 0 to write: how many tokens this rank receives,
  /// and how many each of its experts does, each in the lower half of a word, link.token in the
  /// upper.
  volatile uint64_t* totals;
};

/// A whole combine, or one of its halves. The formula of Buffer::combine.
struct SmallCombineArgs {
  LinkArgs link;
  SmallLayout small = SmallLayout(Dims{}, 0, 0, 0);
  Dims dims;
  Dtype dtype;
  Quant quant;  ///< kFp8: partial rows cross as fp8_row_bytes; kNone: as rows of dtype
  Phase phase;
  int32_t hidden;
  int32_t num_tokens;
  bool by_token;  ///< as CombineArgs::by_token
  PlanView plan;
  const char* x;              ///< rows of the layout
  const float* topk_weights;  ///< [T, K], or null
  const void* bias;           ///< [T, hidden], or null
  void* out;                  ///< [T, hidden]
};

/// The kernels of a call over one kind of link (kernels/link.cuh). Those with num_sms use exactly
/// so many SMs; 0 = by themselves.
struct LinkKernels {
  /// Announces this rank's entry and `words` 4-byte words of announce to all, waits for all,
  /// compares what all announce and copies the announcements of all to announced [num_ranks,
  /// words]. A whole call. Errors: see LinkState and LinkReport.
  void (*exchange)(const LinkArgs& link, const int32_t* announce, int32_t* announced, int words,
                   cudaStream_t stream);
  void (*dispatch)(const SmallDispatchArgs& args, int num_sms, cudaStream_t stream);
  void (*combine)(const SmallCombineArgs& args, int num_sms, cudaStream_t stream);
  bool puts;  ///< SmallLayout needs an outbox
};
/// GPUs that load and store each other's memory.
const LinkKernels& peer_link_kernels();
/// GPUs that reach each other through NVSHMEM.
const LinkKernels& nvshmem_link_kernels();

}  // namespace epcomm
