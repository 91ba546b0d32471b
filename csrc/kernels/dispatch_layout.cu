// Dispatch layout: how many tokens of a routing go to each rank, node and expert, and which.
//
// Buffers: topk_idx is read; the counts and is_token_in_rank are written, every element.
// Launch: one block of 1024 threads for each rank and node, which reads all of topk_idx: a count
// that blocks share would have to be zero before the kernel starts. A tile is as many tokens as
// have room in shared memory for a bit per expert of the rank, so that an expert that is named
// twice counts once.
// Memory order: none between blocks.
#include <algorithm>
#include <string>

#include "epcomm/dispatch_layout.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"

namespace epcomm {
namespace {

constexpr int kThreads = 1024;
constexpr int kIdsInFlight = 8;               // of a thread
constexpr size_t kMaxSharedBytes = 40 << 10;  // less than any GPU gives a block

// What a block counts, and its shared memory.
struct Target {
  bool is_rank;    // else a node
  int index;       // of the rank or node
  int experts;     // that it owns
  int columns;     // bits of a token: of a rank one per expert, of a node one per lane that sets it
  int words;       // of 32 tokens, in a tile
  uint32_t* mask;  // [words, columns]
  int32_t* counts;  // [columns]

  __device__ __forceinline__ Target(const DispatchLayoutArgs& args, int tile_words) {
    const int block = static_cast<int>(blockIdx.x);
    is_rank = block < args.num_ranks;
    index = is_rank ? block : block - args.num_ranks;
    experts = args.num_experts / (is_rank ? args.num_ranks : args.num_nodes);
    columns = is_rank ? experts : kWarpSize;
    words = tile_words;
    mask = reinterpret_cast<uint32_t*>(dynamic_shared());
    counts = reinterpret_cast<int32_t*>(mask + words * columns);
  }
};

// A position in [T, K] that moves on by the same number of slots again and again.
struct SlotWalk {
  int token, slot, topk, more_tokens, more_slots;

  __device__ __forceinline__ SlotWalk(int first, int step, int num_topk)
      : token(first / num_topk),
        slot(first % num_topk),
        topk(num_topk),
        more_tokens(step / num_topk),
        more_slots(step % num_topk) {}
  __device__ __forceinline__ void step() {
    token += more_tokens;
    slot += more_slots;
    if (slot >= topk) {
      slot -= topk;
      ++token;
    }
  }
};

// Sets the bits of the tokens of a tile, whose ids are ids[0, count).
template <class Index>
__device__ __forceinline__ void set_bits(const Target& target, const Index* ids, int count,
                                         int topk) {
  const auto experts = static_cast<uint64_t>(target.experts);
  const uint64_t first_expert = static_cast<uint64_t>(target.index) * experts;
  SlotWalk at(thread_index(), kThreads, topk);
  for (int begin = thread_index(); begin < count; begin += kThreads * kIdsInFlight) {
    int64_t id[kIdsInFlight];
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      const int slot = begin + i * kThreads;
      id[i] = slot < count ? int64_t{ids[slot]} : -1;
    }
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      // Ids below the first, too, are far above the last.
      const uint64_t local = static_cast<uint64_t>(id[i]) - first_expert;
      if (local < experts) {
        const int column = target.is_rank ? static_cast<int>(local) : lane_index();
        atomicOr(&target.mask[at.token / kWarpSize * target.columns + column],
                 1u << at.token % kWarpSize);
      }
      at.step();
    }
  }
}

template <class Index>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_layout_kernel(const __grid_constant__ DispatchLayoutArgs args, const int tile_words) {
  EPCOMM_SHARED(int32_t, total);
  const Target target(args, tile_words);
  if (thread_index() == 0) total = 0;
  for (int i = thread_index(); i < target.columns; i += kThreads) target.counts[i] = 0;
  const int tile_tokens = tile_words * kWarpSize;
  for (int first = 0; first < args.num_tokens; first += tile_tokens) {
    for (int i = thread_index(); i < tile_words * target.columns; i += kThreads) target.mask[i] = 0;
    __syncthreads();
    const int tokens = min(args.num_tokens - first, tile_tokens);
    set_bits(target, static_cast<const Index*>(args.topk_idx) + int64_t{first} * args.topk,
             tokens * args.topk, args.topk);
    __syncthreads();
    for (int word = warp_index(); word * kWarpSize < tokens; word += kThreads / kWarpSize) {
      uint32_t any = 0;
      for (int c = lane_index(); c < target.columns; c += kWarpSize) {
        const uint32_t bits = target.mask[word * target.columns + c];
        any |= bits;
        if (target.is_rank && bits != 0) atomicAdd(&target.counts[c], __popc(bits));
      }
      any = __reduce_or_sync(kFullWarp, any);
      if (lane_index() == 0) atomicAdd(&total, __popc(any));
      const int token = word * kWarpSize + lane_index();
      if (target.is_rank && token < tokens)
        args.is_token_in_rank[(int64_t{first} + token) * args.num_ranks + target.index] =
            any >> lane_index() & 1;
    }
    __syncthreads();
  }
  __syncthreads();
  if (thread_index() == 0)
    (target.is_rank ? args.tokens_per_rank : args.tokens_per_node)[target.index] = total;
  if (!target.is_rank) return;
  for (int i = thread_index(); i < target.experts; i += kThreads)
    args.tokens_per_expert[int64_t{target.index} * target.experts + i] = target.counts[i];
}

}  // namespace

void dispatch_layout_cuda(const DispatchLayoutArgs& args) {
  constexpr size_t kWord = sizeof(uint32_t);
  const int local_experts = args.num_experts / args.num_ranks;
  const bool nodes = args.tokens_per_node != nullptr;
  const size_t column_bytes =
      static_cast<size_t>(std::max(local_experts, nodes ? kWarpSize : 1)) * kWord;
  EPCOMM_CHECK(2 * column_bytes <= kMaxSharedBytes,
               "num_experts is " + std::to_string(args.num_experts) + ", " +
                   std::to_string(local_experts) + " on each rank; expected at most " +
                   std::to_string(kMaxSharedBytes / (2 * kWord)) + " on each");
  const int batch_words = std::max((args.num_tokens + kWarpSize - 1) / kWarpSize, 1);
  const int words =
      std::min(batch_words, static_cast<int>((kMaxSharedBytes - column_bytes) / column_bytes));
  const int blocks = args.num_ranks + (nodes ? args.num_nodes : 0);
  const LaunchShape shape{blocks, kThreads, (words + 1) * column_bytes};
  launch("launch of dispatch_layout",
         args.index_type == IndexType::kInt32 ? dispatch_layout_kernel<int32_t>
                                              : dispatch_layout_kernel<int64_t>,
         shape, static_cast<cudaStream_t>(args.stream), args, words);
}

}  // namespace epcomm
