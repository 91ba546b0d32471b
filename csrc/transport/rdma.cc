// Every row goes to each destination rank once, flat: no rank forwards for another. One kernel per
// call, the kernels of small batches (kernels/small.h) over a link that puts. docs/rdma.md.
//
// Window map, alike on all ranks:
//   control   ControlLayout: the inboxes of the peers, with the slots of their batches
//   small     SmallLayout with its outbox
#include "transport/rdma.h"

#include <exception>
#include <string>
#include <utility>

#include "core/checks.h"
#include "transport/gpu_link_transport.h"
#include "transport/gpu_nvshmem.h"
#include "transport/gpu_nvshmem_windows.h"

namespace epcomm {
namespace {

class RdmaTransport final : public GpuLinkTransport {
 public:
  RdmaTransport(const TransportContext& context, const ControlLayout& control,
                const SmallLayout& small, std::shared_ptr<NvshmemWindow> window)
      : GpuLinkTransport(context, nvshmem_link_kernels(),
                         nvshmem_windows(window, context.bootstrap), control, small, true),
        window_(std::move(window)) {}
  ~RdmaTransport() override {
    drain();
    // Calls end when their puts have landed, here and at the peers, except where a peer was lost.
    try {
      watchdog_.check();
    } catch (const std::exception&) {
      window_->abandon();
    }
  }

  void dispatch(const Plan& plan, const DispatchArgs& args) override { dispatch_small(plan, args); }
  void combine(const Plan& plan, const CombineArgs& args) override { combine_small(plan, args); }
  Allocation allocate(size_t) override { return {}; }
  size_t free_bytes() const override { return 0; }

 private:
  std::shared_ptr<NvshmemWindow> window_;
};

}  // namespace

std::unique_ptr<Transport> make_rdma_transport(const TransportContext& context) {
  EPCOMM_CHECK(context.bootstrap.size() <= kMaxLinkRanks,
               "the rdma transport takes at most " + std::to_string(kMaxLinkRanks) +
                   " ranks; this group has " + std::to_string(context.bootstrap.size()));
  for (const auto& [name, value] : context.options.transport_options)
    throw InvalidArgument("transport_options has '" + name + "': '" + value +
                          "'; the rdma transport has no options");
  const std::string why_not = why_not_small(context);
  EPCOMM_CHECK(why_not.empty(), "the rdma transport moves small batches only, and " + why_not +
                                    "; dispatch in smaller batches, or use transport='nccl'");
  const Config& config = context.options.config;
  const ControlLayout control(gpu_dims(context),
                              SmallLayout::slots_bytes(config.max_tokens, config.topk));
  const SmallLayout small = small_layout(context, control.arena, nvshmem_link_kernels().puts);
  auto window = make_nvshmem_window(context.bootstrap, small.end, context.options.window_bytes);
  return std::make_unique<RdmaTransport>(context, control, small, std::move(window));
}

}  // namespace epcomm
