// Moves rows with the stores and loads of kernels into windows that all GPUs of the group have
// mapped. A row crosses a link once per destination rank and lands in the tensor that the receiving
// rank returns.
//
// route (nvlink.cc): counts on the device, announcements into the peers' windows, slots on the
// device. dispatch and combine: nvlink_rows.cc. kernels/link.h has the protocol.
//
// Window map, alike on all ranks:
//   control   ControlLayout: the inboxes of the peers
//   weights   [max_tokens, topk] float: this rank's topk_weights of a combine, read by the peers
//   staging   [num_ranks, max_tokens] rows: partial rows for this rank's tokens, by the rank that
//             stores them; only where a combine's input lies outside the window
//   arena     what Buffer::allocate hands out
#pragma once

#include <memory>

#include "core/window_arena.h"
#include "kernels/link.h"
#include "transport/gpu_call_order.h"
#include "transport/gpu_memory.h"
#include "transport/gpu_route.h"
#include "transport/gpu_watchdog.h"
#include "transport/gpu_window.h"
#include "transport/transport.h"

namespace epcomm {

struct NvlinkLayout {
  size_t weights, staging, arena, bytes;
  NvlinkLayout(const TransportContext& context, const ControlLayout& control);
};

class NvlinkTransport final : public Transport {
 public:
  explicit NvlinkTransport(const TransportContext& context);
  ~NvlinkTransport() override;

  const Caps& caps() const override { return caps_; }
  RouteResult route(const RouteArgs& args) override;
  void dispatch(const Plan& plan, const DispatchArgs& args) override;
  void combine(const Plan& plan, const CombineArgs& args) override;
  void check() override;
  Allocation allocate(size_t bytes) override { return arena_.allocate(bytes); }
  size_t free_bytes() const override { return arena_.largest_free(); }

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
  void check_outputs(const Plan& plan, const DispatchArgs& args) const;
  void raise_refusal();
  void wait_entered(uint64_t token);
  PlaceArgs place_args(const Plan& plan, const DispatchArgs& args) const;
  void push_partials(const Plan& plan, const CombineArgs& args, const LinkArgs& link);

  Config config_;
  const ExpertMap& experts_;
  int rank_, num_ranks_;
  double timeout_s_;
  Caps caps_;
  uint64_t routes_ = 0;  // calls of route
  uint64_t tokens_ = 0;  // see LinkArgs
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
