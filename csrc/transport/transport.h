// The host seam: one virtual class that every way of moving bytes implements.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/expert_map.h"
#include "epcomm/bootstrap.h"
#include "epcomm/buffer.h"
#include "epcomm/plan.h"
#include "epcomm/types.h"

namespace epcomm {

/// What a transport is made from. options and experts outlive it; bootstrap is there for its
/// constructor only, so that no process group is kept alive.
struct TransportContext {
  Bootstrap& bootstrap;
  const BufferOptions& options;
  const ExpertMap& experts;
};

class Transport {
 public:
  virtual ~Transport() = default;
  virtual const Caps& caps() const = 0;
  /// As Buffer::choice.
  virtual std::string choice() const { return ""; }
  /// Fills plan.view's send block and, where the host waits for it, the result.
  virtual RouteResult route(const RouteArgs& args) = 0;
  virtual void dispatch(const Plan& plan, const DispatchArgs& args) = 0;
  /// For caps().sends_ahead. As Buffer::settle.
  virtual bool settle(Plan&) { return true; }
  virtual void combine(const Plan& plan, const CombineArgs& args) = 0;
  /// Throws what an earlier call could not report when it was made.
  virtual void check() {}
  /// Counted here, for caps().link_counters; null where nothing is counted.
  virtual LinkCounters* link_counters() { return nullptr; }
  /// Where calls from the next on add to; nothing is given that caps() does not offer.
  virtual void set_statistics(const Statistics& statistics) { statistics_ = statistics; }
  /// Bytes that forwarding adds to a plan's receive block.
  virtual size_t forward_bytes(const Plan&) const { return 0; }
  /// Symmetric memory, for caps().symmetric_outputs; others never get these calls.
  virtual Allocation allocate(size_t bytes) = 0;
  virtual size_t free_bytes() const = 0;

 protected:
  Statistics statistics_;
};

using TransportFactory = std::unique_ptr<Transport> (*)(const TransportContext&);

/// The transports linked into this module, by name.
struct TransportEntry {
  const char* name;
  TransportFactory make;
};
const std::vector<TransportEntry>& transports();

}  // namespace epcomm
