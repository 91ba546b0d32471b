// One rank's calls on a Buffer, with the memory that a caller provides. Rows are fp32.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "epcomm/buffer.h"
#include "tests/cpp/tested_transport.h"

namespace epcomm::testing {

/// What one rank wants to send: [tokens, topk] expert ids and weights, [tokens, hidden] rows.
struct Batch {
  int tokens = 0, topk = 0, hidden = 0;
  std::vector<int32_t> topk_idx;
  std::vector<float> weights, x;
};

/// What one rank received, and the plan with the memory behind it.
struct Received {
  Plan plan;
  std::vector<int32_t> send_block, topk_idx;
  std::vector<float> weights;
  Allocation rows, meta, slots;
  int num_rows = 0;
  float* row(int64_t i, int hidden) const {
    return reinterpret_cast<float*>(rows.data) + i * hidden;
  }
};

/// Address of an array that is given but may be empty: null would mean that it is not given.
inline const float* address(const std::vector<float>& v) {
  static const float kNone = 0;
  return v.empty() ? &kNone : v.data();
}

inline BufferOptions options_for(int num_experts, int hidden, int topk, int max_tokens,
                                 double timeout_s) {
  BufferOptions options;
  options.transport = tested_transport.name;
  options.ranks_per_node = tested_transport.ranks_per_node;
  options.transport_options = tested_transport.options;
  options.config = {num_experts, hidden, topk, max_tokens, Dtype::kFloat32};
  options.timeout_s = timeout_s;
  return options;
}

/// ahead: as RouteArgs::ahead. The caller then says in to.plan.result how many tokens it makes room
/// for, and in to.num_rows how many rows.
inline void route(Buffer& buffer, const Batch& batch, Layout layout, int alignment, Received& to,
                  bool ahead = false) {
  to.send_block.assign(buffer.send_block(batch.tokens, batch.topk).bytes / sizeof(int32_t), -7);
  RouteArgs args;
  args.topk_idx = batch.topk_idx.data();
  args.index_type = IndexType::kInt32;
  args.num_tokens = batch.tokens;
  args.topk = batch.topk;
  args.layout = layout;
  args.expert_alignment = alignment;
  args.ahead = ahead;
  args.plan = buffer.view_send_block(to.send_block.data(), batch.tokens, batch.topk);
  finish(buffer, [&] { to.plan = buffer.route(args); });
  to.num_rows = to.plan.result.num_recv_rows;
}

/// Memory that a dispatch of the Buffer can write.
inline Allocation memory_for(Buffer& buffer, size_t bytes) {
  if (buffer.caps().symmetric_outputs) return buffer.allocate(bytes);
  constexpr size_t kAlignment = 256;
  char* data =
      static_cast<char*>(std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment));
  return {data, bytes, std::shared_ptr<void>(data, [](void* p) { std::free(p); })};
}

/// Gives `to` fresh memory for one dispatch of its plan and dispatches into it.
inline void dispatch(Buffer& buffer, const Batch& batch, Received& to) {
  const int received = to.plan.result.num_recv_tokens;
  const int row_bytes = batch.hidden * static_cast<int>(sizeof(float));
  to.meta = memory_for(buffer, buffer.recv_block_bytes(to.plan, received));
  to.rows = memory_for(buffer, static_cast<size_t>(to.num_rows) * static_cast<size_t>(row_bytes));
  if (to.meta.data == nullptr || to.rows.data == nullptr)
    throw std::runtime_error("the test's window is full");
  to.plan = to.plan.with_recv_block(to.meta.data);
  std::memset(to.rows.data, 0xff, to.rows.bytes);  // NaN, so that a row that nobody writes shows
  const bool by_token = to.plan.layout == Layout::kToken;
  const int entries = by_token ? received * batch.topk : to.num_rows;
  to.weights.assign(static_cast<size_t>(entries), std::numeric_limits<float>::quiet_NaN());
  to.topk_idx.assign(static_cast<size_t>(entries), -7);

  DispatchArgs args;
  args.x = batch.x.data();
  args.topk_weights = address(batch.weights);
  args.dtype = Dtype::kFloat32;
  args.row_bytes = row_bytes;
  args.recv_x = to.rows.data;
  args.recv_topk_idx = to.plan.layout == Layout::kPadded ? nullptr : to.topk_idx.data();
  args.recv_topk_weights = to.weights.data();
  args.index_type = IndexType::kInt32;
  args.recv_capacity = received;
  args.row_capacity = to.num_rows;
  // Where peers can write them, they do; every other plan does without.
  const bool shared = by_token && buffer.caps().cuda && to.plan.result.epoch % 2 == 0;
  const size_t slot_bytes = static_cast<size_t>(entries) * sizeof(int32_t);
  if (shared) {
    to.slots = memory_for(buffer, 2 * slot_bytes);
    std::memset(to.slots.data, 0xf9, to.slots.bytes);
    args.recv_topk_idx = to.slots.data;
    args.recv_topk_weights = reinterpret_cast<float*>(to.slots.data + slot_bytes);
  }
  finish(buffer, [&] { buffer.dispatch(to.plan, args); });
  if (shared && slot_bytes != 0) {
    std::memcpy(to.topk_idx.data(), to.slots.data, slot_bytes);
    std::memcpy(to.weights.data(), to.slots.data + slot_bytes, slot_bytes);
  }
}

/// Combines the rows of `from` as they are now. weights: [tokens, topk] of this rank, or null.
inline std::vector<float> combine(Buffer& buffer, const Batch& batch, const Received& from,
                                  const float* weights = nullptr) {
  std::vector<float> y(batch.x.size(), std::numeric_limits<float>::quiet_NaN());
  CombineArgs args;
  args.x = from.rows.data;
  args.topk_weights = weights;
  args.out = y.data();
  args.dtype = Dtype::kFloat32;
  args.hidden = batch.hidden;
  finish(buffer, [&] { buffer.combine(from.plan, args); });
  return y;
}

/// Combines floats per slot: x holds one row of `width` floats for each received token.
inline std::vector<float> combine_by_token(Buffer& buffer, const Batch& batch, const Received& from,
                                           const std::vector<float>& x, int width) {
  std::vector<float> y(static_cast<size_t>(batch.tokens * width),
                       std::numeric_limits<float>::quiet_NaN());
  CombineArgs args;
  args.x = x.data();
  args.out = y.data();
  args.dtype = Dtype::kFloat32;
  args.hidden = width;
  args.by_token = true;
  buffer.combine(from.plan, args);
  tested_transport.finish_calls();
  return y;
}

}  // namespace epcomm::testing
