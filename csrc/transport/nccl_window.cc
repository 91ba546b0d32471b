// Calls are those of small batches (gpu_small_batches.cc) over a window that all GPUs have mapped.
//
// Window map, alike on all ranks:
//   control   ControlLayout: the inboxes of the peers
//   small     SmallLayout: staging of small batches
#include "transport/nccl_window.h"

#include <cstring>
#include <fstream>
#include <map>
#include <utility>
#include <vector>

#include "epcomm/peer_access.h"
#include "transport/gpu_link_transport.h"
#include "transport/gpu_window.h"

namespace epcomm {
namespace {

class NcclWindowTransport final : public GpuLinkTransport {
 public:
  NcclWindowTransport(const TransportContext& context, const ControlLayout& control,
                      const SmallLayout& small, const std::shared_ptr<GpuWindow>& window,
                      std::string choice)
      : GpuLinkTransport(context, peer_link_kernels(),
                         peer_windows(window, context.bootstrap.size()), control, small, true),
        choice_(std::move(choice)) {}

  std::string choice() const override { return choice_; }
  void dispatch(const Plan& plan, const DispatchArgs& args) override { dispatch_small(plan, args); }
  void combine(const Plan& plan, const CombineArgs& args) override { combine_small(plan, args); }
  Allocation allocate(size_t) override { return {}; }
  size_t free_bytes() const override { return 0; }

 private:
  std::string choice_;
};

// What a rank tells the others.
struct Position {
  char refusal[128];  // why it shall not use peers' memory; empty = it may
  char host[96];
};

// As options say, else the running kernel's name for itself.
std::string host_of(const BufferOptions& options) {
  std::string host = options.host;
  if (host.empty()) {
    std::ifstream boot_id("/proc/sys/kernel/random/boot_id");
    std::getline(boot_id, host);
  }
  return host;
}

std::vector<Position> gather_positions(const TransportContext& context) {
  Position mine{};
  const BufferOptions& options = context.options;
  std::strncpy(mine.refusal, options.refuses_peer_memory.c_str(), sizeof mine.refusal - 1);
  std::strncpy(mine.host, host_of(options).c_str(), sizeof mine.host - 1);
  std::vector<Position> all(static_cast<size_t>(context.bootstrap.size()));
  context.bootstrap.all_gather(&mine, all.data(), sizeof mine);
  return all;
}

// All refusals, each with the ranks whose it is.
std::string refusals(const std::vector<Position>& all) {
  std::map<std::string, std::string> ranks_of;
  for (size_t r = 0; r < all.size(); ++r) {
    std::string& ranks = ranks_of[all[r].refusal];
    ranks += (ranks.empty() ? "" : ", ") + std::to_string(r);
  }
  ranks_of.erase("");
  std::string text;
  for (const auto& [refusal, ranks] : ranks_of)
    text += (text.empty() ? "" : "; ") + refusal + " on rank " + ranks;
  return text;
}

}  // namespace

std::string why_no_window(const TransportContext& context) {
  const std::string why_not = why_not_small(context);
  if (!why_not.empty()) return why_not;
  const std::vector<Position> all = gather_positions(context);
  const std::string refused = refusals(all);
  if (!refused.empty()) return refused;
  for (size_t r = 1; r < all.size(); ++r)
    if (std::strcmp(all[r].host, all[0].host) != 0)
      return "ranks 0 and " + std::to_string(r) + " are on different hosts, or NCCL_HOSTID says so";
  const PeerAccess access = check_peer_access(context.bootstrap, context.options.timeout_s);
  return access.good() ? "" : "not all GPUs can address each other: " + access.text();
}

std::unique_ptr<Transport> make_nccl_window_transport(const TransportContext& context,
                                                      std::string choice) {
  const ControlLayout control(gpu_dims(context));
  const SmallLayout small = small_layout(context, control.arena, peer_link_kernels().puts);
  return std::make_unique<NcclWindowTransport>(
      context, control, small,
      make_gpu_window(context.bootstrap, small.end, context.options.timeout_s), std::move(choice));
}

}  // namespace epcomm
