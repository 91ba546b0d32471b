// What all ranks must do alike in one call: names and values, for the message when they do not.
#pragma once

#include <cstdint>
#include <vector>

namespace epcomm {

enum class CallField : int {
  kOperation,
  kLayout,
  kDtype,
  kQuant,  ///< of a combine; a dispatch may move what another rank quantised before
  kTopk,
  kAlignment,
  kRowBytes,
  kScaleBytes,
  kWeighted,
  kRows,  ///< of a combine: CombineArgs::by_token
  kHostSync,
  kPlan,  ///< of a dispatch or combine: number of the route that made its plan
};
constexpr int kCallFields = 12;

/// Throws ConfigMismatch, with the values of all ranks, if they are not all the same.
void check_call_field(CallField field, const std::vector<int32_t>& values);

}  // namespace epcomm
