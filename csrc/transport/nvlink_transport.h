// Moves rows with the stores and loads of kernels into windows that all GPUs of the group have
// mapped. A row crosses a link once per destination rank and lands in the tensor that the receiving
// rank returns.
//
// route (gpu_link_transport.cc): counts on the device, announcements into the peers' windows, slots
// on the device. dispatch and combine: nvlink_rows.cc. kernels/link.h has the protocol. Buffers for
// small batches go another way, one kernel a call: gpu_small_batches.cc, kernels/small.h.
//
// Window map, alike on all ranks:
//   control   ControlLayout: the inboxes of the peers
//   small     SmallLayout: staging of small batches; then nothing of the following is there
//   arrivals  ArrivalLayout: how far the peers have come with rows that are used as they arrive
//   weights   [max_tokens, topk] float: this rank's topk_weights of a combine, read by the peers
//   staging   [num_ranks, max_tokens] rows: rows for this rank's tokens, by the rank that
//             stores them; only where a combine's input lies outside the window
//   arena     what Buffer::allocate hands out
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/window_arena.h"
#include "transport/gpu_link_transport.h"
#include "transport/gpu_window.h"

namespace epcomm {

struct NvlinkLayout {
  SmallLayout small;
  ArrivalLayout arrivals;
  size_t weights, staging, arena, bytes;
  /// takes_small: of takes_small_path.
  NvlinkLayout(const TransportContext& context, const ControlLayout& control, bool takes_small);
};

/// Whether calls of the Buffer go the way of small batches; alike on all ranks. Throws
/// InvalidArgument for a bad option.
bool takes_small_path(const TransportContext& context);

class NvlinkTransport final : public GpuLinkTransport {
 public:
  /// Collective. window: of layout.bytes.
  NvlinkTransport(const TransportContext& context, const ControlLayout& control,
                  const NvlinkLayout& layout, bool takes_small, std::shared_ptr<GpuWindow> window);

  void dispatch(const Plan& plan, const DispatchArgs& args) override;
  void combine(const Plan& plan, const CombineArgs& args) override;
  Allocation allocate(size_t bytes) override {
    return takes_small_ ? Allocation{} : arena_.allocate(bytes);
  }
  size_t free_bytes() const override { return takes_small_ ? 0 : arena_.largest_free(); }

 private:
  std::string too_wide_advice() const override { return " or transport_options={'path': 'large'}"; }
  void make_columns(const Plan& plan, const DispatchArgs& args, int num_sms) const;
  void push_partials(const Plan& plan, const CombineArgs& args, const LinkArgs& link, int num_sms);
  /// Offset in every window of the staging rows that this rank writes there.
  size_t staging_of(int64_t row_bytes) const;

  NvlinkLayout layout_;
  std::shared_ptr<GpuWindow> window_;
  WindowArena arena_;
};

}  // namespace epcomm
