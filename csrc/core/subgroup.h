// A part of a group as a group of its own, for what is made collectively among some of the ranks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "epcomm/bootstrap.h"

namespace epcomm {

/// Ranks [first, first + size) of a group. Every exchange is one of the whole group, so all of its
/// ranks make a SubgroupBootstrap of theirs at the same time and finish it; in between, subgroups
/// may make different numbers of exchanges.
class SubgroupBootstrap final : public Bootstrap {
 public:
  /// The calling rank is in it. all outlives it.
  SubgroupBootstrap(Bootstrap& all, int first, int size) : all_(all), first_(first), size_(size) {}
  int rank() const override { return all_.rank() - first_; }
  int size() const override { return size_; }
  bool in_process() const override { return all_.in_process(); }
  void all_gather(const void* in, void* out, size_t bytes) override;
  /// Takes part in the exchanges of the other subgroups until all have finished.
  void finish();

 private:
  bool exchange(const void* in, void* out, int64_t bytes);

  Bootstrap& all_;
  int first_, size_;
};

}  // namespace epcomm
