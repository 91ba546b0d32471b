// Send: the data phase of a dispatch between GPUs that store into each other's memory. A row is
// read once, quantised in shared memory if asked, and written once per destination rank, straight
// into its place in the tensor that the receiver's caller gets. Where a token may have several rows
// there, the receiver copies it to the others as it arrives (kernels/place_arrived.cuh).
//
// Buffers: x, scales [T, bytes], first_row [T, R], plan.topk_idx, row [T, K] and slot [T, R],
// topk_weights [T, K] are read. In rank r's window, at the offsets that r announced: row
// first_row[t, r] of recv_x and recv_scales, record slot[t, r] of recv_meta.
// Launch: num_sms blocks, one per SM. The first warps of a block move rows: each has kStages pieces
// of a row in shared memory, loads pieces ahead and stores each to all its destinations, lane i to
// rank (this rank + 1 + i): no receiver is hit by all senders at once. Pieces go to whoever comes
// for them. The other warps write records and scales. Without bulk copies (before sm_90) all warps
// copy through registers.
// Placing: the blocks that start first send, so that a block which waits for rows never keeps one
// from its SM that sends; the others place from the start, senders when they are done. Their last
// warp writes no records, but tells how far the block has come, then follows what arrives.
// Memory order: kernels/link.cuh, kernels/arrivals.cuh. Each thread waits until its bulk stores are
// written before its block arrives at the end.
#include <algorithm>

#include "kernels/arrivals.cuh"
#include "kernels/device.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/piece_numbers.cuh"
#include "kernels/place_arrived.cuh"
#include "kernels/quant.cuh"
#include "kernels/rows.cuh"

namespace epcomm {
namespace {

constexpr int kStages = 4;
constexpr int kQuantPiece = 512;  // elements; a piece that is quantised is a multiple of it
[[maybe_unused]] constexpr int kQuantSteps = 4;  // vectors that a lane quantises at a time
constexpr int kScaleBytes = 256;                 // room behind a piece for its scales
constexpr size_t kSharedBytes = 220 << 10;  // for stages: an SM has 228 KB, a part of it reserved

// Few warps keep whole rows in flight; arithmetic wants many warps, on short pieces.
template <bool kQuantised>
constexpr int kMaxRowWarps = kQuantised ? 16 : 8;
// Records take as long as what they wait for: more warps, more of them at a time.
template <bool kQuantised>
constexpr int kRecordWarps = kQuantised ? 4 : 8;
template <bool kQuantised>
constexpr int kMaxPieceBytes = kQuantised ? 4 << 10 : 16 << 10;

// How a block is divided; the host and the kernel agree on it.
struct SendShape {
  int32_t senders;  // blocks that send
  int32_t row_warps, record_warps;
  int32_t pieces;       // of a row of x
  int32_t piece_bytes;  // the last may be shorter
  int32_t stage_bytes;  // of a piece and its scales
};
struct SendKernelArgs {
  SendArgs send;
  SendShape shape;
  PlaceShape place;
};
static_assert(sizeof(SendKernelArgs) <= kMaxKernelArgs);

// The rank that a lane stores to; lanes from num_ranks on store nothing.
__device__ __forceinline__ int rank_of_lane(const LinkArgs& link) {
  return (link.rank + 1 + lane_index()) % link.num_ranks;
}
__device__ __forceinline__ int32_t destination(const SendArgs& args, int t) {
  const int num_ranks = args.link.num_ranks;
  return lane_index() < num_ranks ? args.first_row[int64_t{t} * num_ranks + rank_of_lane(args.link)]
                                  : -1;
}

// The elements [begin, end) of a row, quantised: where their codes and scales are in a row.
struct QuantPiece {
  int32_t code_at, code_bytes, scale_at, scale_bytes;
};

// A warp quantises a piece of a row in place: codes at its start, scales behind it. A lane reads
// its vectors before any lane writes codes over them: quantize_vectors brings the lanes together,
// and codes are at most half as long.
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ QuantPiece quantize_piece(const SendArgs& args, char* piece, int begin,
                                                     int end, char* scales,
                                                     const GlobalScale& global) {
  using Lanes = QuantLanes<kQuant, kDtype>;
  constexpr int kPer = kPerVector<kDtype>, kUnit = kScaleUnitBytes<kQuant>;
  const QuantLayout layout = make_quant_layout(kQuant, args.hidden);
  const int first = begin / kPer, vectors = (end - begin) / kPer;
  QuantPiece out;
  out.code_at = first * Lanes::kCodeBytes;
  out.code_bytes = vectors * Lanes::kCodeBytes;
  out.scale_at = group_of<kQuant, kDtype>(first) * kUnit;
  for (int at = 0; at < vectors; at += kQuantSteps * kWarpSize) {
    uint4 data[kQuantSteps] = {};
#pragma unroll
    for (int u = 0; u < kQuantSteps; ++u)
      if (const int v = at + u * kWarpSize + lane_index(); v < vectors)
        data[u] = *reinterpret_cast<const uint4*>(piece + v * kVectorBytes);
    QuantVector made[kQuantSteps];
    quantize_vectors<kQuant, kDtype>(data, global, made);
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kQuantSteps; ++u) {
      const int v = at + u * kWarpSize + lane_index();
      if (v >= vectors) break;
      store_codes<kQuant, kDtype>(piece, v, made[u]);
      if (stores_scale<kQuant, kDtype>(v))
        store_scale<kQuant>(scales + group_of<kQuant, kDtype>(v) * kUnit, made[u].scale);
    }
  }
  int scale_end = group_of<kQuant, kDtype>(first + vectors) * kUnit;
  if (end == args.hidden) {
    finish_scales<kQuant>(scales - out.scale_at, layout, global.global);
    scale_end = layout.wire_scale_bytes;
  }
  out.scale_bytes = scale_end - out.scale_at;
  fence_shared_for_bulk();
  __syncwarp();
  return out;
}

// One warp's share of the pieces, number w of `warps`.
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ void send_rows(const SendKernelArgs& args, const LinkCall& call, int w,
                                          int warps, SentByWarp sent, BulkBarrier* loaded,
                                          char* stages) {
  const SendArgs& send = args.send;
  const SendShape& shape = args.shape;
  const int lane = lane_index();
  constexpr bool kQuantised = kQuant != Quant::kNone;
  const int64_t row_bytes = send.rows.row_bytes;
  const int x_bytes =
      kQuantised ? send.hidden * kElementBytes<kDtype> : send.rows.row_bytes;  // of a row
  const GlobalScale global = make_global_scale(kQuant == Quant::kNvfp4 ? *send.global_scale : 1.0f);
  const int peer = rank_of_lane(send.link);
  char* rows =
      lane < send.link.num_ranks ? call.at(send.link, peer, call.entry[peer].rows) : nullptr;
  if (lane == 0)
    for (int s = 0; s < kStages; ++s) barrier_init(loaded + s);
  fence_barrier_init();
  __syncwarp();

  // Of the piece in each stage: its token (those of a warp ascend), row there, offset in its row
  // (-1: no piece).
  int32_t of[kStages], to[kStages], from[kStages];
  constexpr int kUnwritten = 2;        // pieces that may be on their way when the warp tells
  int32_t unwritten[kUnwritten] = {};  // tokens of the pieces that were stored last
  auto bytes_at = [&](int offset) {
    return static_cast<uint32_t>(min(shape.piece_bytes, x_bytes - offset));
  };
  const int count = send.num_tokens * shape.pieces;
  auto load = [&](int s, int number) {
    from[s] = -1;
    if (number >= count) return;
    const int token = of[s] = number / shape.pieces;
    from[s] = (number - token * shape.pieces) * shape.piece_bytes;
    if (lane == 0) {
      barrier_expect(loaded + s, bytes_at(from[s]));
      bulk_load(stages + s * shape.stage_bytes, send.x + int64_t{token} * x_bytes + from[s],
                bytes_at(from[s]), loaded + s);
    }
    to[s] = destination(send, token);
  };
  PieceNumbers<kStages - 1> numbers(&send.link.state->pieces, w, warps, count);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load(s, w + s * warps);
  for (uint32_t parity = 0;; parity ^= 1) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (from[s] < 0) {
        bulk_wait_written();
        fence_global_for_bulk();
        sent.tell(send.num_tokens);
        return;
      }
      barrier_wait(loaded + s, parity);
      char* stage = stages + s * shape.stage_bytes;
      int offset = from[s];
      uint32_t bytes = bytes_at(offset);
      if constexpr (kQuantised) {
        const int begin = offset / kElementBytes<kDtype>;
        const int end = begin + static_cast<int>(bytes) / kElementBytes<kDtype>;
        char* scales = stage + shape.piece_bytes;
        const QuantPiece piece =
            quantize_piece<kQuant, kDtype>(send, stage, begin, end, scales, global);
        for (uint32_t rest = __ballot_sync(kFullWarp, to[s] >= 0); rest != 0;) {
          const int at = take_lowest(rest), r = __shfl_sync(kFullWarp, peer, at);
          const int64_t row = __shfl_sync(kFullWarp, to[s], at);
          copy_bytes(call.at(send.link, r, call.entry[r].scales) + row * send.rows.scale_bytes +
                         piece.scale_at,
                     scales, piece.scale_bytes);
        }
        offset = piece.code_at;
        bytes = static_cast<uint32_t>(piece.code_bytes);
      }
      if (to[s] >= 0) bulk_store(rows + to[s] * row_bytes + offset, stage, bytes);
      bulk_commit();
      unwritten[s % kUnwritten] = of[s];
      if (const int oldest = unwritten[(s + 1) % kUnwritten]; sent.due(oldest)) {
        bulk_wait_written<kUnwritten>();
        fence_global_for_bulk();
        sent.tell(oldest);
      }
      // The stage to load into is that of the piece before, which may still be read.
      bulk_wait_read<1>();
      __syncwarp();
      load((s + kStages - 1) % kStages, numbers.take());
    }
  }
}

// The same through registers, by all warps that send.
__device__ __forceinline__ void copy_rows(const SendArgs& args, const LinkCall& call, int w,
                                          int warps) {
  const int64_t row_bytes = args.rows.row_bytes;
  const RowJobs jobs(args.num_tokens, args.rows.row_bytes, w, warps);
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    const int32_t row = destination(args, job.row);
    const uint32_t lanes = __ballot_sync(kFullWarp, row >= 0);
    Batch batch;
    for (int v = job.begin + lane_index(); v - lane_index() < job.end; v += Batch::kStep) {
      batch.load(args.x + job.row * row_bytes, v, job.end);
      for (uint32_t rest = lanes; rest != 0;) {
        const int i = take_lowest(rest), peer = (args.link.rank + 1 + i) % args.link.num_ranks;
        const int64_t to = __shfl_sync(kFullWarp, row, i);
        batch.store(call.at(args.link, peer, call.entry[peer].rows) + to * row_bytes, v, job.end);
      }
    }
  }
}

// What goes beside the rows of the tokens w, w + warps, ...: records, slots and scales.
__device__ __forceinline__ void send_records(const SendArgs& args, const LinkCall& call, int w,
                                             int warps, SentByWarp sent) {
  const MetaLayout meta(args.dims.topk);
  const int lane = lane_index(), topk = args.dims.topk, num_ranks = args.link.num_ranks;
  const bool weighted = args.topk_weights != nullptr;
  for (int t = w; t < args.num_tokens; t += warps) {
    if (sent.due(t)) sent.tell(t);
    const int32_t first = destination(args, t);
    const int32_t slot =
        lane < num_ranks ? args.plan.slot[int64_t{t} * num_ranks + rank_of_lane(args.link)] : -1;
    TokenSlots slots;
    slots.token = t;
    int owner = -1;
    int32_t row = -1, local = -1;  // of the slot, at the owner of its expert
    if (lane < topk) {
      slots.expert = args.plan.topk_idx[int64_t{t} * topk + lane];
      if (args.records) row = args.plan.row[int64_t{t} * topk + lane];
      if (weighted) slots.weight = args.topk_weights[int64_t{t} * topk + lane];
      if (slots.expert >= 0) {
        owner = args.experts.rank[slots.expert];
        local = args.experts.local[slots.expert];
      }
    }
    for (uint32_t rest = __ballot_sync(kFullWarp, first >= 0); rest != 0;) {
      const int i = take_lowest(rest), peer = (args.link.rank + 1 + i) % num_ranks;
      const LinkEntry& there = call.entry[peer];
      const int64_t n = __shfl_sync(kFullWarp, slot, i), to = __shfl_sync(kFullWarp, first, i);
      if (args.records) {
        slots.row = owner == peer ? row : -1;
        write_record(meta, meta.row(call.at(args.link, peer, there.meta), n), slots, weighted);
      }
      write_slots(args.link.window[peer], there, topk, n, owner == peer ? local : -1, slots.weight);
      if (args.scales != nullptr && args.rows.scale_bytes != 0)
        copy_bytes(call.at(args.link, peer, there.scales) + to * args.rows.scale_bytes,
                   args.scales + int64_t{t} * args.rows.scale_bytes, args.rows.scale_bytes);
    }
  }
  sent.tell(args.num_tokens);
}

// Of the tokens below some token, how many go to the rank of the lane.
class TokensBelow {
 public:
  __device__ __forceinline__ explicit TokensBelow(const SendArgs& args)
      : slots_(args.plan.slot), num_ranks_(args.link.num_ranks) {
    if (lane_index() >= num_ranks_) return;
    for (int s = 0; s < args.link.rank; ++s)
      before_ += args.plan.rank_count[s * num_ranks_ + lane_index()];
  }
  __device__ __forceinline__ int32_t operator()(int told, int below) {
    // Slots ascend with tokens: that of the last token which went there tells how many went.
    int32_t slot = -1;
    for (int t = below; t > told && slot < 0; --t)
      slot = slots_[int64_t{t - 1} * num_ranks_ + lane_index()];
    if (slot >= 0) count_ = slot - before_ + 1;
    return count_;
  }

 private:
  const int32_t* slots_;
  int num_ranks_;
  int32_t before_ = 0;  // slots there of lower ranks' tokens
  int32_t count_ = 0;
};

// A block's share of what this rank sends; sent null: nobody wants to know how far it has come.
template <Quant kQuant, Dtype kDtype>
__device__ __forceinline__ void send_share(const SendKernelArgs& args, const LinkCall& call,
                                           SentTokens* sent, BulkBarrier* loaded) {
  const SendArgs& send = args.send;
  const SendShape& shape = args.shape;
  const int warp = warp_index(), row_warps = shape.row_warps, record_warps = shape.record_warps;
  const int step = signal_step(send.num_tokens);
  if (warp >= row_warps + record_warps)
    return publish_sent(send.link, send.arrivals, call, *sent, row_warps + record_warps,
                        {send.num_tokens, step}, TokensBelow(send));
  const SentByWarp told(sent, step);
  // Warps of one block have pieces far apart, so that few pieces, too, spread over all SMs.
  if constexpr (kHasBulkCopies) {
    if (warp < row_warps)
      send_rows<kQuant, kDtype>(args, call, warp * shape.senders + call.block,
                                row_warps * shape.senders, told, loaded + warp * kStages,
                                dynamic_shared() + warp * kStages * shape.stage_bytes);
  } else {
    copy_rows(send, call, warp * shape.senders + call.block,
              (row_warps + record_warps) * shape.senders);
    if (warp < row_warps) SentByWarp(told).tell(send.num_tokens);
  }
  if (warp >= row_warps)
    send_records(send, call, (warp - row_warps) * shape.senders + call.block,
                 record_warps * shape.senders, told);
}

// A block's share of what this rank receives.
__device__ __forceinline__ void place_share(const SendKernelArgs& args, const LinkCall& call,
                                            Arrivals& here, BulkBarrier* loaded) {
  // What this block has sent does not use its shared memory any more, which bulk loads fill now.
  if constexpr (kHasBulkCopies) fence_shared_for_bulk();
  __syncthreads();
  const SendArgs& send = args.send;
  const int num_ranks = send.link.num_ranks, rank = send.link.rank;
  here.fill(send.link, args.shape.senders, [&](int s) {
    int32_t first = 0;
    for (int i = 0; i < s; ++i) first += send.plan.rank_count[i * num_ranks + rank];
    return SourceTokens{first, send.plan.rank_count[s * num_ranks + rank]};
  });
  const int warp = warp_index();
  if (here.may_wait == 0) return;  // blocks that start later do it
  if (warp == args.shape.row_warps + args.shape.record_warps)
    watch_arrivals(send.link, send.arrivals, call, here);
  else if (warp < args.place.warps)
    place_arrived(send, args.place, here,
                  {dynamic_shared() + warp * kPlaceGroup * args.place.stage_bytes,
                   loaded + warp * kPlaceGroup});
}

template <Quant kQuant, Dtype kDtype>
__global__ void __launch_bounds__((kMaxRowWarps<kQuant != Quant::kNone> +
                                   kRecordWarps<kQuant != Quant::kNone>)*kWarpSize,
                                  1) send_kernel(const __grid_constant__ SendKernelArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  EPCOMM_SHARED(BulkBarrier[kMaxRowWarps<kQuant != Quant::kNone> * kStages], loaded);
  EPCOMM_SHARED(BulkBarrier[kMaxPlaceWarps * kPlaceGroup], place_loaded);
  EPCOMM_SHARED(SentTokens, sent);
  EPCOMM_SHARED(Arrivals, here);
  const SendArgs& send = args.send;
  if (has_no_routing(send.link, send.room)) return;
  sent.clear();
  if (link_enter(send.link, call, nullptr, 0, missing_room(send.room),
                 send.places ? BlockOrder::kStarted : BlockOrder::kIndex)) {
    if (call.block == 0 && send.link.statistics.received_tokens != nullptr)
      for (int e = thread_index(); e < send.dims.local_experts; e += static_cast<int>(blockDim.x))
        add_received(send.link.statistics, e, send.plan.tokens_per_expert[e]);
    if (call.block < args.shape.senders)
      send_share<kQuant, kDtype>(args, call, send.places ? &sent : nullptr, loaded);
    if (send.places) place_share(args, call, here, place_loaded);
  }
  link_finish(send.link, call);
}

template <bool kQuantised>
SendShape shape_of(const SendArgs& args) {
  const int row_bytes = kQuantised ? args.hidden * dtype_bytes(args.x_dtype) : args.rows.row_bytes;
  const size_t unit =
      static_cast<size_t>(kQuantised ? kQuantPiece * dtype_bytes(args.x_dtype) : kBulkLine);
  SendShape shape;
  shape.pieces = (row_bytes + kMaxPieceBytes<kQuantised> - 1) / kMaxPieceBytes<kQuantised>;
  shape.piece_bytes = static_cast<int32_t>(
      align_up(static_cast<size_t>((row_bytes + shape.pieces - 1) / shape.pieces), unit));
  shape.pieces = (row_bytes + shape.piece_bytes - 1) / shape.piece_bytes;
  shape.stage_bytes = shape.piece_bytes + (kQuantised ? kScaleBytes : 0);
  const size_t warps = kSharedBytes / (kStages * static_cast<size_t>(shape.stage_bytes));
  shape.row_warps = static_cast<int32_t>(std::min<size_t>(warps, size_t{kMaxRowWarps<kQuantised>}));
  shape.record_warps = kRecordWarps<kQuantised>;
  return shape;
}

PlaceShape place_shape_of(const RowSpec& rows, int most_warps) {
  PlaceShape shape;
  shape.pieces = (rows.row_bytes + kMaxPlacePieceBytes - 1) / kMaxPlacePieceBytes;
  shape.piece_bytes = static_cast<int32_t>(align_up(
      static_cast<size_t>((rows.row_bytes + shape.pieces - 1) / shape.pieces), kRowAlignment));
  const bool bulk = rows.scale_bytes % kVectorBytes == 0 && rows.scale_bytes <= kMaxPlacePieceBytes;
  shape.scale_bytes = bulk ? rows.scale_bytes : 0;
  shape.stage_bytes = shape.piece_bytes + static_cast<int32_t>(align_up(
                                              static_cast<size_t>(shape.scale_bytes), kBulkLine));
  const size_t warps = kSharedBytes / (kPlaceGroup * static_cast<size_t>(shape.stage_bytes));
  shape.warps = static_cast<int32_t>(
      std::min<size_t>(warps, static_cast<size_t>(std::min(most_warps, kMaxPlaceWarps))));
  return shape;
}

using SendKernel = void (*)(SendKernelArgs);

template <Quant kQuant>
SendKernel quantising_kernel(Dtype dtype) {
  return for_dtype(dtype, send_kernel<kQuant, Dtype::kBfloat16>,
                   send_kernel<kQuant, Dtype::kFloat16>, send_kernel<kQuant, Dtype::kFloat32>);
}

SendKernel kernel_of(const SendArgs& args) {
  switch (args.quant) {
    case Quant::kFp8:
      return quantising_kernel<Quant::kFp8>(args.x_dtype);
    case Quant::kFp8Ue8m0:
      return quantising_kernel<Quant::kFp8Ue8m0>(args.x_dtype);
    case Quant::kNvfp4:
      return quantising_kernel<Quant::kNvfp4>(args.x_dtype);
    case Quant::kNone:
      break;
  }
  return send_kernel<Quant::kNone, Dtype::kBfloat16>;
}

}  // namespace

bool can_quantise_on_the_way() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

void launch_send(const SendArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.x, "x");
  SendKernelArgs kernel = {};
  kernel.send = args;
  SendShape& shape = kernel.shape;
  shape = args.quant == Quant::kNone ? shape_of<false>(args) : shape_of<true>(args);
  const int blocks = persistent_blocks(num_sms);
  const int warps = shape.row_warps + shape.record_warps;
  size_t stages =
      static_cast<size_t>(shape.row_warps * kStages) * static_cast<size_t>(shape.stage_bytes);
  shape.senders = blocks;
  if (args.places) {
    check_aligned(args.place.recv_x, "recv_x");
    check_aligned(args.place.recv_scales, "recv_scales");
    shape.senders = std::min((blocks + 1) / 2, args.most_senders);
    kernel.send.link.entry.senders = shape.senders;
    kernel.place = place_shape_of(args.rows, warps);
    stages = std::max(stages, kernel.place.shared_bytes());
    --shape.record_warps;
  }
  const bool bulk = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  launch("launch of send", kernel_of(args), {blocks, warps * kWarpSize, bulk ? stages : 0}, stream,
         kernel);
}

}  // namespace epcomm
