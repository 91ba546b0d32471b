// Host entry points of the kernels between nodes of GPUs (docs/hierarchical.md): rows go once to
// each node that wants them, along the rail by NVSHMEM, and are forwarded there by stores; the sums
// of a node come back the same way. Entering and leaving a call: kernels/link.h, over NVSHMEM.
//
// Nobody writes to a rank before that rank has entered the call, and a rank leaves a call when all
// have read what was put or stored for it. So no area is used by two calls at a time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "epcomm/types.h"
#include "kernels/kernels.h"
#include "kernels/link.h"
#include "kernels/node_layout.h"
#include "kernels/rail_layout.h"
#include "kernels/token_layout.h"

namespace epcomm {

/// A rank's end of its rails and of its node, as kernels get it.
struct RailArgs {
  LinkArgs link;  ///< window: its own alone
  NodeMap map;
  RailLayout rail = RailLayout(NodeMap{}, 0, 0, 0, Chunks{}, 0);
  /// Windows of the ranks of this node, by rank, by their addresses here; null of others.
  char* node_window[kMaxLinkRanks];
};

/// Behind launch_count: fills node_slot, node_token and this rank's node_count of the plan, whose
/// topk_idx is filled.
void launch_node_slots(const NodeMap& map, int rank, int num_tokens, int topk,
                       const DeviceExperts& experts, const PlanView& plan, cudaStream_t stream);

/// The data phase of a dispatch, with its beginning and end.
struct RailDispatchArgs {
  RailArgs rail;
  Dims dims;
  RowSpec rows;
  int32_t num_tokens;
  const char* x;
  const char* scales;
  const float* topk_weights;  ///< null: weights of the records are left unwritten
  /// Records, and what stays of forwarded rows, are written, not kept from an earlier dispatch.
  bool records;
  DeviceExperts experts;
  PlanView plan;
  const int32_t* first_row;  ///< [T, R]: row at rank r that is written, -1 = not sent there
  GuessedRoom room;
};
/// Uses exactly num_sms SMs.
void launch_rail_dispatch(const RailDispatchArgs& args, int num_sms, cudaStream_t stream);

/// Begins a combine and, where weights are given, sends them to all ranks and waits for theirs.
struct RailEnterArgs {
  RailArgs rail;
  int32_t topk;
  int32_t num_tokens;
  const float* topk_weights;  ///< [T, K], or null
};
void launch_rail_enter(const RailEnterArgs& args, cudaStream_t stream);

/// The rest of a combine: sums for the tokens of other nodes, which go back along the rail, then
/// the tokens of this rank. Of a rank of the node whose x has one row per received token, in its
/// node window, the rows are loaded from there; others have stored their partial rows before, and
/// say so in their entry (LinkEntry::pushed).
struct RailCombineArgs {
  RailArgs rail;
  NodeWindowLayout node = NodeWindowLayout(NodeMap{}, 0, 0);
  Dims dims;
  Dtype dtype;
  int32_t hidden;
  int32_t num_tokens;
  PlanView plan;
  bool weighted;  ///< with the weights that launch_rail_enter has exchanged
  DeviceExperts experts;
  const void* bias;  ///< [T, hidden], or null
  void* out;         ///< [T, hidden]
};
/// Uses exactly num_sms SMs. The formula of Buffer::combine, by nodes.
void launch_rail_combine(const RailCombineArgs& args, int num_sms, cudaStream_t stream);

}  // namespace epcomm
