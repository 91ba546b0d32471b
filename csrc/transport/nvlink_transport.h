// Moves rows with the stores and loads of kernels into windows that all GPUs of the group have
// mapped. A row crosses a link once per destination rank and lands in the tensor that the receiving
// rank returns.
//
// route (nvlink.cc): counts on the device, announcements into the peers' windows, slots on the
// device. dispatch and combine: nvlink_rows.cc. kernels/link.h has the protocol. Buffers for small
// batches go another way, one kernel a call: nvlink_small.cc, kernels/small.h.
//
// Window map, alike on all ranks:
//   control   ControlLayout: the inboxes of the peers
//   small     SmallLayout: staging of small batches; then nothing of the following is there
//   weights   [max_tokens, topk] float: this rank's topk_weights of a combine, read by the peers
//   staging   [num_ranks, max_tokens] rows: partial rows for this rank's tokens, by the rank that
//             stores them; only where a combine's input lies outside the window
//   arena     what Buffer::allocate hands out
#pragma once

#include <memory>
#include <optional>

#include "core/call_fields.h"
#include "core/window_arena.h"
#include "kernels/link.h"
#include "kernels/small.h"
#include "transport/gpu_call_order.h"
#include "transport/gpu_memory.h"
#include "transport/gpu_route.h"
#include "transport/gpu_watchdog.h"
#include "transport/gpu_window.h"
#include "transport/transport.h"

namespace epcomm {

struct NvlinkLayout {
  SmallLayout small;
  size_t weights, staging, arena, bytes;
  /// takes_small: of takes_small_path.
  NvlinkLayout(const TransportContext& context, const ControlLayout& control, bool takes_small);
};

/// Sizes of this rank for the Buffer's topk.
Dims nvlink_dims(const TransportContext& context);
/// Whether calls of the Buffer go the way of small batches; alike on all ranks. Throws
/// InvalidArgument for a bad option.
bool takes_small_path(const TransportContext& context);

inline int32_t& entry_field(LinkEntry& entry, CallField field) {
  return entry.signature[static_cast<int>(field)];
}
/// What all ranks must know alike of the plan of a dispatch or combine.
void describe_plan(LinkEntry& entry, const Plan& plan);

class NvlinkTransport final : public Transport {
 public:
  NvlinkTransport(const TransportContext& context, bool takes_small);
  ~NvlinkTransport() override;

  const Caps& caps() const override { return caps_; }
  RouteResult route(const RouteArgs& args) override;
  void dispatch(const Plan& plan, const DispatchArgs& args) override;
  void combine(const Plan& plan, const CombineArgs& args) override;
  void check() override;
  Allocation allocate(size_t bytes) override {
    return takes_small_ ? Allocation{} : arena_.allocate(bytes);
  }
  size_t free_bytes() const override { return takes_small_ ? 0 : arena_.largest_free(); }

 private:
  // One call on the stream, from its construction to end(). A call that throws in between is
  // half-way: it tells the peers.
  class Call {
   public:
    Call(NvlinkTransport& transport, cudaStream_t stream) : transport_(transport), stream_(stream) {
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
    NvlinkTransport& transport_;
    cudaStream_t stream_;
    bool ended_ = false;
  };

  Dims dims(int topk) const;
  LinkArgs link(Operation operation) const;
  uint64_t offset_of(const void* p) const;
  void check_capacity(const Plan& plan, const DispatchArgs& args) const;
  void check_outputs(const Plan& plan, const DispatchArgs& args) const;
  void raise_refusal();
  void wait_entered(uint64_t token);
  void push_partials(const Plan& plan, const CombineArgs& args, const LinkArgs& link);
  void check_phase(Phase phase, Operation operation);
  void check_fits_slot(int64_t row_bytes, int64_t scale_bytes) const;
  RouteResult route_small(const RouteArgs& args);
  void dispatch_small(const Plan& plan, const DispatchArgs& args);
  void combine_small(const Plan& plan, const CombineArgs& args);

  const bool takes_small_;
  Config config_;
  const ExpertMap& experts_;
  int rank_, num_ranks_;
  double timeout_s_;
  Caps caps_;
  uint64_t routes_ = 0;            // calls of route
  uint64_t tokens_ = 0;            // see LinkArgs
  std::optional<Operation> half_;  // of which only the send half was called
  GpuRoute route_;
  ControlLayout control_;
  NvlinkLayout layout_;
  std::unique_ptr<GpuWindow> window_;
  WindowArena arena_;
  DeviceMemory state_;   // LinkState
  PinnedMemory report_;  // LinkReport
  GpuWatchdog watchdog_;
  GpuCallOrder order_;
};

}  // namespace epcomm
