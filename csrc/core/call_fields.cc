#include "core/call_fields.h"

#include <algorithm>
#include <string>

#include "epcomm/error.h"

namespace epcomm {
namespace {

constexpr const char* kNames[kCallFields] = {
    "operation", "layout",      "dtype",        "quant", "topk",      "expert_alignment",
    "row_bytes", "scale_bytes", "topk_weights", "rows",  "host_sync", "plan"};

std::string text(CallField field, int32_t value) {
  static constexpr const char* kLayouts[] = {"unset", "token", "expert", "padded"};
  static constexpr const char* kDtypes[] = {"none",    "bfloat16",      "float16",
                                            "float32", "float8_e4m3fn", "uint8"};
  static constexpr const char* kQuants[] = {"none", "fp8", "fp8_ue8m0", "nvfp4"};
  switch (field) {
    case CallField::kOperation:
      return operation_name(static_cast<Operation>(value));
    case CallField::kLayout:
      if (value >= 0 && value < 4) return kLayouts[value];
      break;
    case CallField::kDtype:
      if (value >= 0 && value < 6) return kDtypes[value];
      break;
    case CallField::kQuant:
      if (value >= 0 && value < 4) return kQuants[value];
      break;
    case CallField::kWeighted:
      return value != 0 ? "given" : "not given";
    case CallField::kRows:
      return value != 0 ? "one per token" : "of the layout";
    case CallField::kHostSync:
      return value != 0 ? "True" : "False";
    case CallField::kPlan:
      return "routed in epoch " + std::to_string(value);
    default:
      break;
  }
  return std::to_string(value);
}

}  // namespace

void check_call_field(CallField field, const std::vector<int32_t>& values) {
  if (std::all_of(values.begin(), values.end(), [&](int32_t v) { return v == values[0]; })) return;
  std::vector<std::string> texts;
  for (int32_t value : values) texts.push_back(text(field, value));
  throw ConfigMismatch(kNames[static_cast<int>(field)], texts);
}

}  // namespace epcomm
