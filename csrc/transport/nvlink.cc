// The nvlink transport: making it.
#include "transport/nvlink.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/checks.h"
#include "transport/nvlink_transport.h"

namespace epcomm {
namespace {

constexpr size_t kPage = 4096;

}  // namespace

bool takes_small_path(const TransportContext& context) {
  std::string path = "auto";
  for (const auto& [name, value] : context.options.transport_options) {
    if (name != "path")
      throw InvalidArgument("transport_options has '" + name +
                            "'; the nvlink transport has one option, path");
    path = value;
  }
  if (path == "large") return false;
  const std::string why_not = why_not_small(context);
  if (path == "small")
    EPCOMM_CHECK(why_not.empty(), "transport_options['path'] is 'small', but " + why_not);
  else
    EPCOMM_CHECK(path == "auto", "transport_options['path'] is '" + path +
                                     "'; expected 'auto', 'small' or 'large'");
  return why_not.empty();
}

NvlinkLayout::NvlinkLayout(const TransportContext& context, const ControlLayout& control,
                           bool takes_small)
    : small(small_layout(context, control.arena, peer_link_kernels().puts)),
      arrivals(context.bootstrap.size(), control.arena) {
  if (takes_small) {
    weights = staging = arena = bytes = align_up(small.end, kPage);
    return;
  }
  const Config& config = context.options.config;
  const size_t ranks = static_cast<size_t>(context.bootstrap.size()),
               tokens = static_cast<size_t>(config.max_tokens);
  weights = align_up(arrivals.end, kPage);
  staging = align_up(weights + tokens * static_cast<size_t>(config.topk) * sizeof(float), kPage);
  arena = align_up(staging + ranks * tokens * small.row_bytes, kPage);
  bytes = arena + received_arena_bytes(context);
}

NvlinkTransport::NvlinkTransport(const TransportContext& context, const ControlLayout& control,
                                 const NvlinkLayout& layout, bool takes_small,
                                 std::shared_ptr<GpuWindow> window)
    : GpuLinkTransport(context, peer_link_kernels(), peer_windows(window, context.bootstrap.size()),
                       control, layout.small, takes_small),
      layout_(layout),
      window_(std::move(window)),
      arena_(*window_, layout_.arena) {
  caps_.symmetric_outputs = !takes_small_;
  if (can_quantise_on_the_way()) caps_.fused_quants = kAllQuants;
}

std::unique_ptr<Transport> make_nvlink_transport(const TransportContext& context) {
  EPCOMM_CHECK(context.bootstrap.size() <= kMaxLinkRanks,
               "the nvlink transport takes at most " + std::to_string(kMaxLinkRanks) +
                   " ranks; this group has " + std::to_string(context.bootstrap.size()));
  const bool takes_small = takes_small_path(context);
  const ControlLayout control(gpu_dims(context));
  const NvlinkLayout layout(context, control, takes_small);
  return std::make_unique<NvlinkTransport>(
      context, control, layout, takes_small,
      make_gpu_window(context.bootstrap, layout.bytes, context.options.timeout_s));
}

}  // namespace epcomm
