// Dispatch of a small batch around an all-gather, for transports whose kernels cannot reach their
// peers: one kernel before it and one behind, which routes the tokens of all ranks.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/mark.h"
#include "kernels/small.h"

namespace epcomm {

/// Fills this rank's places in args.link.window[rank], the memory that is gathered: expert ids,
/// weights and rows at SmallLayout's places of epoch 0; -1 are the ids of tokens that there are
/// not. Of args.link rank, num_ranks and that window are used. args.fresh.
void launch_stage(const SmallDispatchArgs& args, const Mark& mark, int num_sms,
                  cudaStream_t stream);

/// When the places of all ranks are filled: fills the plan, its records and the outputs.
void launch_unstage(const SmallDispatchArgs& args, const Mark& mark, int num_sms,
                    cudaStream_t stream);

}  // namespace epcomm
