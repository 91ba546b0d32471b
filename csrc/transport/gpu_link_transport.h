// What the transports share whose kernels enter calls through a link (kernels/link.cuh): the state
// of calls, waiting for them, refusals, route, and the calls of small batches (kernels/small.h; in
// gpu_small_batches.cc). Received rows of small batches are written by this rank alone, so that
// they lie where the caller wants.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "core/call_fields.h"
#include "core/window_arena.h"
#include "kernels/link.h"
#include "kernels/small.h"
#include "transport/gpu_call_order.h"
#include "transport/gpu_memory.h"
#include "transport/gpu_route.h"
#include "transport/gpu_watchdog.h"
#include "transport/transport.h"

namespace epcomm {

class GpuWindow;

/// Sizes of this rank for the Buffer's topk.
Dims gpu_dims(const TransportContext& context);
/// Bytes of a row of the Buffer's hidden and dtype.
size_t widest_row(const Config& config);
/// Memory for what calls return, where peers write it: window_bytes, or what some calls need.
size_t received_arena_bytes(const TransportContext& context);
/// Staging of small batches from an offset of the window on; puts: see LinkKernels.
SmallLayout small_layout(const TransportContext& context, size_t begin, bool puts);
/// Why the Buffer's calls cannot go the way of small batches; empty = they can. Alike on all ranks.
std::string why_not_small(const TransportContext& context);

inline int32_t& entry_field(LinkEntry& entry, CallField field) {
  return entry.signature[static_cast<int>(field)];
}
/// What all ranks must know alike of the plan of a dispatch or combine.
void describe_plan(LinkEntry& entry, const Plan& plan);

/// The same of a dispatch, and what is missing to receive its rows.
void describe_rows(LinkEntry& entry, const Plan& plan, const DispatchArgs& args);
/// The same where the peers store rows where they stay, in this rank's arena, and where that is.
void describe_dispatch(LinkEntry& entry, const Plan& plan, const DispatchArgs& args,
                       const WindowArena& arena);
/// Whether such a dispatch can receive anything. Ahead of its counts, a rank that has not found
/// even the memory that it guessed says -1.
inline bool makes_room(const DispatchArgs& args) {
  return args.needed_bytes == 0 && args.recv_capacity >= 0;
}
/// Whether some slots of layout kToken are not in the window, where the peers would write them.
inline bool leaves_slots(const LinkEntry& entry, const DispatchArgs& args) {
  return (args.recv_topk_idx != nullptr && entry.topk_idx == 0) ||
         (args.recv_topk_weights != nullptr && entry.topk_weights == 0);
}

/// All ranks' windows, as kernels of this rank address them (LinkArgs), and what keeps them.
struct LinkWindows {
  char* window[kMaxLinkRanks] = {};
  int32_t pe[kMaxLinkRanks] = {};
  uint32_t cut_for = 0;  ///< LinkEntry::cut_for
  std::shared_ptr<void> owner;
};
/// Those of a window that all GPUs have mapped.
LinkWindows peer_windows(const std::shared_ptr<GpuWindow>& window, int num_ranks);

class GpuLinkTransport : public Transport {
 public:
  /// kernels: of this transport's link. small: where small batches have their staging. Collective.
  GpuLinkTransport(const TransportContext& context, const LinkKernels& kernels, LinkWindows windows,
                   const ControlLayout& control, const SmallLayout& small, bool takes_small);
  ~GpuLinkTransport() override { drain(); }

  const Caps& caps() const override { return caps_; }
  RouteResult route(const RouteArgs& args) override;
  bool settle(Plan& plan) override;
  void check() override;

 protected:
  // One call on the stream, from its construction to end(). A call that throws in between is
  // half-way: it tells the peers.
  class Call {
   public:
    Call(GpuLinkTransport& transport, cudaStream_t stream)
        : transport_(transport), stream_(stream) {
      transport_.order_.begin(stream);
    }
    ~Call() {
      if (!ended_) transport_.watchdog_.abandon("it failed half-way through a call");
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    void end() {
      transport_.order_.end(stream_);
      ended_ = true;
    }

   private:
    GpuLinkTransport& transport_;
    cudaStream_t stream_;
    bool ended_ = false;
  };

  /// What was launched may not have begun yet: until it is over, or a timeout has passed. Before
  /// memory goes that kernels use.
  void drain();
  Dims dims(int topk) const;
  /// Most rows that this rank can receive with the plan.
  int32_t most_rows(const Plan& plan) const;
  LinkArgs link(Operation operation) const;
  void check_capacity(const Plan& plan, const DispatchArgs& args) const;
  /// Throws InvalidArgument unless what the peers store lies in the arena, and fits.
  void check_outputs(const Plan& plan, const DispatchArgs& args, const WindowArena& arena) const;
  /// What the kernel of a dispatch ahead of its counts compares them with; of others, nothing.
  GuessedRoom guessed_room(const Plan& plan, const DispatchArgs& args) const;
  /// Whether a row is no wider than those that staging is made for.
  bool fits_slot(int64_t row_bytes, int64_t scale_bytes) const {
    return row_bytes + scale_bytes <= static_cast<int64_t>(small_.row_bytes);
  }
  /// Throws InvalidArgument for one that is.
  void check_fits_slot(int64_t row_bytes, int64_t scale_bytes) const;
  /// Until all ranks have entered the call of this token; throws what they refuse it for.
  void wait_entered(uint64_t token);
  void dispatch_small(const Plan& plan, const DispatchArgs& args);
  void combine_small(const Plan& plan, const CombineArgs& args);

  static constexpr uint32_t kAllQuants =
      Caps::bit(Quant::kFp8) | Caps::bit(Quant::kFp8Ue8m0) | Caps::bit(Quant::kNvfp4);

  const bool takes_small_;
  const LinkKernels kernels_;
  Config config_;
  const ExpertMap& experts_;
  int rank_, num_ranks_;
  double timeout_s_;
  Caps caps_;
  uint64_t tokens_ = 0;  // see LinkArgs
  GpuRoute route_;
  ControlLayout control_;
  SmallLayout small_;
  LinkWindows windows_;
  DeviceMemory state_;   // LinkState
  PinnedMemory report_;  // LinkReport
  GpuWatchdog watchdog_;
  GpuCallOrder order_;

 private:
  /// Launches what else a transport makes of the plan's topk_idx as it routes.
  virtual void route_more(const RouteArgs&) {}
  /// What else helps where a row does not fit into staging, beginning with " or"; "" = nothing.
  virtual std::string too_wide_advice() const { return ""; }
  template <class Reached>
  void await(Reached reached);
  void await_entered(uint64_t token);
  void drain_blocks() const;
  bool raise_refusal(bool settles = false);
  void expect_settle(bool expected) {
    std::lock_guard lock(refusals_);
    settling_ = expected;
  }
  void raise_all_refusals();
  void check_phase(Phase phase, Operation operation);
  void check_most_room(const Plan& plan, const DispatchArgs& args) const;
  RouteResult route_small(const RouteArgs& args);

  uint64_t routes_ = 0;  // calls of route
  RouteArgs unsettled_;  // of the last that was made ahead
  // It is not settled yet: refusals are for settle to see.
  bool settling_ = false;
  std::mutex refusals_;            // of settling_, and of what kernels report
  std::optional<Operation> half_;  // of which only the send half was called
};

}  // namespace epcomm
