#include "transport/gpu_route.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "core/call_fields.h"
#include "core/checks.h"
#include "epcomm/error.h"

namespace epcomm {
namespace {

constexpr CallField kAnnounced[] = {
    CallField::kLayout,   CallField::kTopk,       CallField::kAlignment, CallField::kDtype,
    CallField::kRowBytes, CallField::kScaleBytes, CallField::kWeighted,  CallField::kHostSync};
static_assert(std::size(kAnnounced) == AnnounceLayout::kSignatureWords);

DeviceMemory to_device(const std::vector<int32_t>& values) {
  DeviceMemory memory(values.size() * sizeof(int32_t));
  EPCOMM_CUDA_TRY(cudaMemcpy(memory.get(), values.data(), values.size() * sizeof(int32_t),
                             cudaMemcpyHostToDevice));
  return memory;
}

size_t columns(const AnnounceLayout& layout) {
  return static_cast<size_t>(layout.num_ranks) + static_cast<size_t>(layout.num_experts);
}

}  // namespace

GpuRoute::GpuRoute(const Config& config, const ExpertMap& experts, int rank, int num_ranks)
    : config_(config),
      experts_(experts),
      rank_(rank),
      num_ranks_(num_ranks),
      layout_{num_ranks, config.num_experts},
      expert_rank_(to_device(experts.ranks())),
      expert_local_(to_device(experts.locals())),
      tile_count_(static_cast<size_t>(num_tiles(config.max_tokens)) * columns(layout_) *
                  sizeof(int32_t)),
      announce_(announce_bytes()),
      fetched_words_(announce_bytes() * static_cast<size_t>(num_ranks)),
      bad_index_(3 * sizeof(int32_t)),
      totals_((1 + static_cast<size_t>(experts.local_experts(rank))) * sizeof(uint64_t)) {}

RouteKernelArgs GpuRoute::args(const RouteArgs& args, int chunks) const {
  RouteKernelArgs k{};
  k.dims = {num_ranks_, config_.num_experts, experts_.local_experts(rank_), args.topk, true};
  k.rank = rank_;
  k.max_tokens = config_.max_tokens;
  k.num_tokens = args.num_tokens;
  k.chunks = chunks;
  k.layout = args.layout;
  k.expert_alignment = args.expert_alignment;
  k.index_type = args.index_type;
  const int32_t signature[] = {static_cast<int32_t>(args.layout),
                               args.topk,
                               args.expert_alignment,
                               static_cast<int32_t>(args.dtype),
                               args.row_bytes,
                               args.scale_bytes,
                               args.weighted ? 1 : 0,
                               args.host_sync ? 1 : 0};
  static_assert(sizeof signature == sizeof k.signature);
  std::copy(std::begin(signature), std::end(signature), k.signature);
  k.topk_idx = args.topk_idx;
  k.experts = experts();
  k.plan = args.plan;
  k.bad_index = args.host_sync ? nullptr : bad_index_.as<int32_t>();
  k.tile_count = tile_count_.as<int32_t>();
  k.announce = announce();
  k.announced = args.plan.announced;
  return k;
}

PlaceArgs GpuRoute::place_args(const Plan& plan, const DispatchArgs& args) const {
  PlaceArgs p{};
  p.dims = {num_ranks_, config_.num_experts, experts_.local_experts(rank_), plan.topk, true};
  p.rows = {args.row_bytes, args.scale_bytes};
  p.layout = plan.layout;
  p.rank = rank_;
  p.index_type = args.index_type;
  p.recv_capacity = args.recv_capacity;
  p.row_capacity = args.row_capacity;
  p.experts = experts();
  p.plan = plan.view;
  p.recv_x = static_cast<char*>(args.recv_x);
  p.recv_scales = static_cast<char*>(args.recv_scales);
  p.recv_topk_idx = args.recv_topk_idx;
  p.recv_topk_weights = args.recv_topk_weights;
  return p;
}

void GpuRoute::report_bad_index() {
  auto* words = bad_index_.as<int32_t>();
  const int bad = std::atomic_ref(words[0]).exchange(0);
  EPCOMM_CHECK(bad == 0, bad_expert_id(rank_, bad - 1, words[2], words[1], config_.num_experts));
}

void GpuRoute::fetch(const int32_t* announced, cudaStream_t stream) {
  EPCOMM_CUDA_TRY(cudaMemcpyAsync(fetched_words_.as<char>(), announced,
                                  announce_bytes() * static_cast<size_t>(num_ranks_),
                                  cudaMemcpyDeviceToHost, stream));
  EPCOMM_CUDA_TRY(cudaEventRecord(fetched_.get(), stream));
}

RouteResult GpuRoute::result(const RouteArgs& args, int chunks) const {
  for (int f = 0; f < AnnounceLayout::kSignatureWords; ++f) {
    std::vector<int32_t> values;
    for (int r = 0; r < num_ranks_; ++r) values.push_back(word(r, AnnounceLayout::kSignature + f));
    check_call_field(kAnnounced[f], values);
  }
  for (int r = 0; r < num_ranks_; ++r) {
    const int bad = word(r, AnnounceLayout::kBadIndex);
    EPCOMM_CHECK(bad == 0, bad_expert_id(r, bad - 1, args.topk, word(r, AnnounceLayout::kBadValue),
                                         config_.num_experts));
  }
  RouteResult result;
  for (int c = 0; c < chunks; ++c)
    for (int s = 0; s < num_ranks_; ++s)
      for (int d = 0; d < num_ranks_; ++d)
        result.chunk_count.push_back(word(s, layout_.chunk_count(c) + d));
  result.num_recv_tokens = 0;
  for (int s = 0; s < num_ranks_; ++s)
    result.num_recv_tokens += word(s, layout_.rank_count() + rank_);
  result.tokens_per_expert.assign(static_cast<size_t>(experts_.local_experts(rank_)), 0);
  for (int e = 0; e < config_.num_experts; ++e)
    if (experts_.rank(e) == rank_)
      for (int s = 0; s < num_ranks_; ++s)
        result.tokens_per_expert[static_cast<size_t>(experts_.local(e))] +=
            word(s, layout_.expert_count() + e);
  result.num_recv_rows = static_cast<int32_t>(received_rows(args, result));
  return result;
}

bool GpuRoute::has_totals(uint64_t token) const {
  for (int i = 0; i <= experts_.local_experts(rank_); ++i) {
    const uint64_t word =
        std::atomic_ref(totals_.as<uint64_t>()[i]).load(std::memory_order_acquire);
    if (word >> 32 != static_cast<uint32_t>(token)) return false;
  }
  return true;
}

RouteResult GpuRoute::totals_result(const RouteArgs& args) const {
  const auto* words = totals_.as<uint64_t>();
  RouteResult result;
  result.num_recv_tokens = static_cast<int32_t>(words[0]);
  for (int e = 0; e < experts_.local_experts(rank_); ++e)
    result.tokens_per_expert.push_back(static_cast<int32_t>(words[1 + e]));
  result.num_recv_rows = static_cast<int32_t>(received_rows(args, result));
  return result;
}

int64_t GpuRoute::received_rows(const RouteArgs& args, const RouteResult& result) const {
  if (args.layout == Layout::kToken) return result.num_recv_tokens;
  if (args.layout == Layout::kPadded)
    return int64_t{experts_.local_experts(rank_)} * num_ranks_ * config_.max_tokens;
  int64_t rows = 0;
  for (int32_t n : result.tokens_per_expert)
    rows += static_cast<int64_t>(
        align_up(static_cast<size_t>(n), static_cast<size_t>(args.expert_alignment)));
  return rows;
}

}  // namespace epcomm
