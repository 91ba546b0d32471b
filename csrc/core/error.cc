#include "epcomm/error.h"

namespace epcomm {
namespace {

std::string mismatch_text(const std::string& field, const std::vector<std::string>& values) {
  // Ranks with the same value are listed together, so that one odd rank among many stands out.
  std::string text = "ranks disagree on " + field + ":";
  std::vector<bool> listed(values.size(), false);
  for (size_t i = 0; i < values.size(); ++i) {
    if (listed[i]) continue;
    text += (i == 0 ? " " : "; ") + values[i] + " on rank";
    std::string ranks;
    int count = 0;
    for (size_t j = i; j < values.size(); ++j) {
      if (values[j] != values[i]) continue;
      listed[j] = true;
      ranks += (count++ ? ", " : " ") + std::to_string(j);
    }
    text += (count > 1 ? "s" : "") + ranks;
  }
  return text + "; it must be equal on all ranks";
}

}  // namespace

const char* operation_name(Operation operation) {
  switch (operation) {
    case Operation::kInit:
      return "init";
    case Operation::kRoute:
      return "route";
    case Operation::kDispatch:
      return "dispatch";
    case Operation::kCombine:
      return "combine";
  }
  return "unknown";
}

PeerLost::PeerLost(int rank_, Operation operation_, uint64_t epoch_, const std::string& detail)
    : Error("rank " + std::to_string(rank_) + " was lost during " + operation_name(operation_) +
            " (epoch " + std::to_string(epoch_) + "): " + detail +
            "; make a new Buffer over the ranks that are left"),
      rank(rank_),
      operation(operation_),
      epoch(epoch_) {}

Evicted::Evicted(int by_rank_, Operation operation_, uint64_t epoch_)
    : Error("this rank was given up as lost by rank " + std::to_string(by_rank_) + " during " +
            operation_name(operation_) + " (epoch " + std::to_string(epoch_) +
            "): it did not answer within the timeout; this Buffer cannot be used any more"),
      by_rank(by_rank_),
      operation(operation_),
      epoch(epoch_) {}

ConfigMismatch::ConfigMismatch(std::string field_, const std::vector<std::string>& value_per_rank_)
    : Error(mismatch_text(field_, value_per_rank_)),
      field(std::move(field_)),
      value_per_rank(value_per_rank_) {}

WindowFull::WindowFull(int rank_, size_t needed_bytes_, size_t free_bytes_)
    : Error(
          "the window of rank " + std::to_string(rank_) + " is full: needed " +
          std::to_string(needed_bytes_) + " bytes, largest free piece " +
          std::to_string(free_bytes_) +
          " bytes; drop received tensors that are no longer used, or make the Buffer with a larger "
          "window_bytes"),
      rank(rank_),
      needed_bytes(needed_bytes_),
      free_bytes(free_bytes_) {}

}  // namespace epcomm
