// Routing as all GPU transports do it: the kernels' arguments and scratch memory, and what the host
// reads of the announcements. How announcements travel between ranks is the transport's own.
#pragma once

#include <cuda_runtime_api.h>

#include "core/expert_map.h"
#include "epcomm/plan.h"
#include "epcomm/types.h"
#include "kernels/kernels.h"
#include "kernels/token_layout.h"
#include "transport/gpu_memory.h"

namespace epcomm {

class GpuRoute {
 public:
  /// experts outlives the GpuRoute.
  GpuRoute(const Config& config, const ExpertMap& experts, int rank, int num_ranks);

  DeviceExperts experts() const {
    return {expert_rank_.as<int32_t>(), expert_local_.as<int32_t>()};
  }
  const AnnounceLayout& layout() const { return layout_; }
  size_t announce_bytes() const { return static_cast<size_t>(layout_.words()) * sizeof(int32_t); }
  /// [layout().words()] of this rank, written by launch_count.
  int32_t* announce() const { return announce_.as<int32_t>(); }

  /// See RouteKernelArgs.
  volatile int32_t* bad_index() const { return bad_index_.as<int32_t>(); }

  /// For launch_count and launch_assign.
  RouteKernelArgs args(const RouteArgs& args, int chunks) const;
  /// For launch_place, with all sources' rows and records in place already.
  PlaceArgs place_args(const Plan& plan, const DispatchArgs& args) const;
  /// Throws InvalidArgument for a bad expert id of an earlier route whose counts the host did not
  /// wait for.
  void report_bad_index();

  /// Copies the announcements of all ranks to the host; fetched() is recorded behind.
  void fetch(const int32_t* announced, cudaStream_t stream);
  cudaEvent_t fetched() const { return fetched_.get(); }
  /// What fetch has brought; after fetched(). Throws ConfigMismatch and InvalidArgument (a bad
  /// expert id), the same on all ranks.
  RouteResult result(const RouteArgs& args, int chunks) const;

  /// See SmallDispatchArgs.
  volatile uint64_t* totals() const { return totals_.as<uint64_t>(); }
  /// Whether all totals are those of this call.
  bool has_totals(uint64_t token) const;
  /// What the totals say.
  RouteResult totals_result(const RouteArgs& args) const;

 private:
  int32_t word(int rank, int index) const {
    return fetched_words_.as<int32_t>()[rank * layout_.words() + index];
  }
  int64_t received_rows(const RouteArgs& args, const RouteResult& result) const;

  Config config_;
  const ExpertMap& experts_;
  int rank_, num_ranks_;
  AnnounceLayout layout_;
  DeviceMemory expert_rank_, expert_local_, tile_count_, announce_;
  PinnedMemory fetched_words_;
  PinnedMemory bad_index_;  // see RouteKernelArgs; for calls without host_sync
  PinnedMemory totals_;
  Event fetched_;
};

}  // namespace epcomm
