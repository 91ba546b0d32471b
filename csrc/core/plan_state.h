// The inverse of Plan::state.
#pragma once

#include <cstdint>
#include <vector>

#include "epcomm/plan.h"

namespace epcomm {

/// The plan without its memory. Throws InvalidArgument if the numbers cannot be a plan's state.
Plan plan_from_state(const std::vector<int64_t>& state);

}  // namespace epcomm
