// The immutable result of routing one batch: who sends which token to which row.
#pragma once

#include <cstdint>
#include <vector>

#include "epcomm/types.h"

namespace epcomm {

/// Made by Buffer::route, read by dispatch and combine any number of times. The arrays behind view
/// belong to the caller, who keeps them alive and unchanged as long as the plan is used.
struct Plan {
  uint64_t buffer_id = 0;  ///< the Buffer that made it; no other accepts it
  bool attached = false;   ///< view has its receive block
  Layout layout = Layout::kUnset;
  int32_t expert_alignment = 1;
  int32_t num_tokens = 0;  ///< T on this rank
  int32_t topk = 0;        ///< K
  bool host_sync = true;
  PlanView view;
  RouteResult result;

  /// The same plan with its receive block: num_recv tokens' records (Buffer::recv_block_bytes),
  /// which may be null where that is 0.
  Plan with_recv_block(void* recv_meta) const {
    Plan plan = *this;
    plan.attached = true;
    plan.view.recv_meta = recv_meta;
    return plan;
  }

  /// What the host knows of the plan, as numbers: Buffer::restore makes the plan from it again.
  std::vector<int64_t> state() const;
};

}  // namespace epcomm
