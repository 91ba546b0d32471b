// All ranks of a kernels_reference.h World on one GPU: runs the routing and row kernels and
// compares every byte they wrote, and did not write, with what the world expects.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cuda_error.h"
#include "kernels/kernels.h"
#include "kernels/token_layout.h"
#include "tests/cpp/gpu_arrays.h"
#include "tests/cpp/kernels_reference.h"

namespace epcomm::test {

// One rank's memory.
struct Rank {
  Array<char> ids, block, x, scales, bias, expert_out;
  Array<float> weights;
  Array<int32_t> tile_count, announce;
  PlanView plan;
  std::vector<Array<char>> send_x, send_scales, send_meta, partial;  // by peer
  Array<char> recv_x, recv_scales, recv_index, recv_meta, recv_weights, out;
};

// All ranks of a world on the device.
class Trial {
 public:
  Trial(Device& device, World& world, bool filled);
  void route();
  void check_route();
  void pack();
  void check_pack();
  void make_outputs();
  void place();
  void place_gathered();
  void check_place(const std::string& what);
  void combine();
  void check_combine();
  void combine_dense();

  PackArgs pack_args(int s, int chunk) const;
  PlaceArgs place_args(int r) const;
  PartialArgs partial_args(int r, int chunk) const;
  SumArgs sum_args(int s, int chunk) const;
  RouteKernelArgs route_args(int s) const;
  Rank& rank(int r) { return ranks_[static_cast<size_t>(r)]; }

 private:
  // Launches now, or by way of a graph that runs twice.
  template <class Launch>
  void run(Launch launch);
  Dims dims(int r) const { return {c.num_ranks, c.num_experts, w.num_local[r], c.topk, true}; }
  // An array of every rank put one after another, each padded to stride elements.
  template <class T>
  Array<T> gather(size_t stride, const std::vector<Array<T>>& pieces);

  Device& device;
  World& w;
  const Case& c;
  Array<int32_t> owner_, local_;
  std::vector<Rank> ranks_;
};

inline Trial::Trial(Device& device_, World& world, bool filled)
    : device(device_),
      w(world),
      c(w.c),
      owner_(upload(device, w.owner)),
      local_(upload(device, w.local)),
      ranks_(static_cast<size_t>(c.num_ranks)) {
  for (int r = 0; r < c.num_ranks; ++r) {
    Rank& m = rank(r);
    const std::vector<int64_t>& raw = w.raw_ids[r];
    const size_t index_bytes = static_cast<size_t>(c.index_type);
    Bytes ids(raw.size() * index_bytes);
    for (size_t i = 0; i < raw.size(); ++i)
      std::memcpy(ids.data() + i * index_bytes, &raw[i], index_bytes);
    m.ids = upload(device, ids);
    const PlanSendLayout layout(dims(r), w.tokens[r]);
    m.block = make_array<char>(device, layout.bytes, kPoisonWord);
    set_send_block(m.plan, m.block.data, layout);
    const size_t columns = static_cast<size_t>(c.num_ranks + c.num_experts);
    m.tile_count =
        make_array<int32_t>(device, static_cast<size_t>(num_tiles(w.tokens[r])) * columns, 0xff);
    m.announce = make_array<int32_t>(
        device, static_cast<size_t>(AnnounceLayout{c.num_ranks, c.num_experts}.words()),
        kPoisonWord);
    m.weights = upload(device, w.weights[r]);
    if (filled) {
      m.x = upload(device, w.x[r]);
      m.scales = upload(device, w.scales[r]);
      m.bias = upload(device, w.bias[r]);
      m.expert_out = upload(device, w.expert_out[r]);
    } else {
      m.x = make_array<char>(device, size_t(w.tokens[r]) * c.row_bytes, 0);
      m.expert_out = make_array<char>(device, size_t(w.row_capacity(r)) * c.combine_bytes, 0);
    }
    m.out = make_array<char>(device, size_t(w.tokens[r]) * c.combine_bytes, kPoisonRow);
  }
}

template <class Launch>
void Trial::run(Launch launch) {
  if (!c.graph) return launch();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  EPCOMM_CUDA_TRY(cudaStreamSynchronize(device.stream));
  EPCOMM_CUDA_TRY(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeGlobal));
  launch();
  EPCOMM_CUDA_TRY(cudaStreamEndCapture(device.stream, &graph));
  EPCOMM_CUDA_TRY(cudaGraphInstantiate(&exec, graph, 0));
  for (int i = 0; i < 2; ++i) EPCOMM_CUDA_TRY(cudaGraphLaunch(exec, device.stream));
  EPCOMM_CUDA_TRY(cudaStreamSynchronize(device.stream));
  EPCOMM_CUDA_TRY(cudaGraphExecDestroy(exec));
  EPCOMM_CUDA_TRY(cudaGraphDestroy(graph));
}

inline RouteKernelArgs Trial::route_args(int s) const {
  const Rank& m = ranks_[static_cast<size_t>(s)];
  RouteKernelArgs a = {};
  a.dims = dims(s);
  a.rank = s;
  a.max_tokens = w.max_tokens;
  a.num_tokens = w.tokens[s];
  a.chunks = c.chunks;
  a.layout = c.layout;
  a.expert_alignment = c.alignment;
  a.index_type = c.index_type;
  for (int i = 0; i < AnnounceLayout::kSignatureWords; ++i) a.signature[i] = 1000 + i;
  a.topk_idx = m.ids.data;
  a.experts = {owner_.data, local_.data};
  a.plan = m.plan;
  a.tile_count = m.tile_count.data;
  a.announce = m.announce.data;
  a.announced = m.plan.announced;
  return a;
}

inline void Trial::route() {
  const size_t words = rank(0).announce.count;
  for (int s = 0; s < c.num_ranks; ++s) run([&] { launch_count(route_args(s), device.stream); });
  for (int s = 0; s < c.num_ranks; ++s)
    for (int r = 0; r < c.num_ranks; ++r)
      EPCOMM_CUDA_TRY(cudaMemcpyAsync(rank(r).plan.announced + size_t(s) * words,
                                      rank(s).announce.data, words * sizeof(int32_t),
                                      cudaMemcpyDeviceToDevice, device.stream));
  for (int s = 0; s < c.num_ranks; ++s) run([&] { launch_assign(route_args(s), device.stream); });
}

inline void Trial::check_route() {
  for (int s = 0; s < c.num_ranks; ++s) {
    const Rank& m = rank(s);
    auto same = [&](const Ints& want, int32_t* got, const char* what) {
      expect_equal(device, want, Array<int32_t>{got, want.size(), false}, what, c);
    };
    expect_equal(device, w.announce[s], m.announce, "announce", c);
    same(w.ids[s], m.plan.topk_idx, "topk_idx");
    same(w.slot[s], m.plan.slot, "slot");
    same(w.row[s], m.plan.row, "row");
    same(w.rank_count, m.plan.rank_count, "rank_count");
    same(w.expert_count, m.plan.expert_count, "expert_count");
    same(w.expert_offset[s], m.plan.expert_offset, "expert_offset");
    same(w.tokens_per_expert[s], m.plan.tokens_per_expert, "tokens_per_expert");
    same({static_cast<int>(w.recv[s].size())}, m.plan.num_recv, "num_recv");
    expect_equal(device, {}, Array<int32_t>{m.tile_count.data + m.tile_count.count, 0, true},
                 "tile_count", c);
    expect_equal(device, {}, Array<char>{m.block.data + m.block.count, 0, true}, "plan", c);
  }
}

inline PackArgs Trial::pack_args(int s, int chunk) const {
  const Rank& m = ranks_[static_cast<size_t>(s)];
  PackArgs a = {};
  a.dims = dims(s);
  a.rows = {c.row_bytes, c.scale_bytes};
  a.rank = s;
  a.chunk = chunk;
  a.chunks = c.chunks;
  a.num_tokens = w.tokens[s];
  a.x = m.x.data;
  a.scales = m.scales.data;
  a.topk_weights = c.weighted ? m.weights.data : nullptr;
  a.experts = {owner_.data, local_.data};
  a.plan = m.plan;
  for (int r = 0; r < c.num_ranks; ++r)
    a.target[r] = {m.send_x[r].data, m.send_scales[r].data, m.send_meta[r].data};
  return a;
}

inline void Trial::make_outputs() {
  const size_t record = MetaLayout(c.topk).record_bytes;
  for (int r = 0; r < c.num_ranks; ++r) {
    Rank& m = rank(r);
    const size_t rows = static_cast<size_t>(w.row_capacity(r));
    const size_t recv = static_cast<size_t>(w.recv_capacity(r));
    const size_t entries = c.layout == Layout::kToken ? recv * c.topk : rows;
    m.recv_x = make_array<char>(device, rows * c.row_bytes, kPoisonRow);
    m.recv_scales = make_array<char>(device, rows * c.scale_bytes, kPoisonRow);
    m.recv_index =
        make_array<char>(device, entries * static_cast<size_t>(c.index_type), kPoisonWord);
    m.recv_weights = make_array<char>(device, entries * sizeof(float), kPoisonRow);
    m.recv_meta = make_array<char>(device, recv * record, kPoisonWord);
    m.plan.recv_meta = m.recv_meta.data;
  }
}

inline void Trial::pack() {
  const size_t record = MetaLayout(c.topk).record_bytes;
  for (int s = 0; s < c.num_ranks; ++s) {
    Rank& m = rank(s);
    for (int r = 0; r < c.num_ranks; ++r) {
      const size_t n = static_cast<size_t>(w.count(s, r)), base = size_t(w.recv_base(s, r));
      if (c.in_place) {
        const Rank& to = rank(r);
        m.send_x.push_back({to.recv_x.data + base * c.row_bytes, n * c.row_bytes});
        m.send_scales.push_back({to.recv_scales.data + base * c.scale_bytes, n * c.scale_bytes});
        m.send_meta.push_back({to.recv_meta.data + base * record, n * record});
      } else {
        m.send_x.push_back(make_array<char>(device, n * c.row_bytes, kPoisonRow));
        m.send_scales.push_back(make_array<char>(device, n * c.scale_bytes, kPoisonRow));
        m.send_meta.push_back(make_array<char>(device, n * record, kPoisonWord));
      }
    }
    run([&] {
      for (int chunk = 0; chunk < c.chunks; ++chunk) {
        PackArgs a = pack_args(s, chunk);
        if (chunk > 0) {  // in two parts
          a.destinations = uint64_t{1} << s;
          launch_pack(a, c.num_sms, device.stream);
          a.destinations = ~a.destinations;
        }
        launch_pack(a, c.num_sms, device.stream);
      }
    });
  }
}

inline void Trial::check_pack() {
  for (int s = 0; s < c.num_ranks; ++s)
    for (int r = 0; r < c.num_ranks; ++r) {
      const Packed want = w.packed(s, r);
      expect_equal(device, want.x, rank(s).send_x[r], "packed x", c);
      expect_equal(device, want.scales, rank(s).send_scales[r], "packed scales", c);
      expect_equal(device, want.meta, rank(s).send_meta[r], "packed meta", c);
    }
}

inline PlaceArgs Trial::place_args(int r) const {
  const Rank& m = ranks_[static_cast<size_t>(r)];
  PlaceArgs a = {};
  a.dims = dims(r);
  a.rows = {c.row_bytes, c.scale_bytes};
  a.layout = c.layout;
  a.rank = r;
  a.index_type = c.index_type;
  a.recv_capacity = w.recv_capacity(r);
  a.row_capacity = w.row_capacity(r);
  a.experts = {owner_.data, local_.data};
  a.plan = m.plan;
  for (int s = 0; s < c.num_ranks; ++s) {
    const Rank& from = ranks_[static_cast<size_t>(s)];
    if (from.send_x.empty()) continue;  // gathered instead
    a.source[s] = {from.send_x[r].data, from.send_scales[r].data, from.send_meta[r].data};
    if (c.in_place) a.source[s].x = a.source[s].scales = nullptr;
  }
  a.recv_x = m.recv_x.data;
  a.recv_scales = m.recv_scales.data;
  a.recv_topk_idx = m.recv_index.data;
  a.recv_topk_weights = c.weighted ? reinterpret_cast<float*>(m.recv_weights.data) : nullptr;
  return a;
}

inline void Trial::place() {
  for (int r = 0; r < c.num_ranks; ++r)
    run([&] {
      PlaceArgs a = place_args(r);
      a.chunks = c.chunks;
      a.clears = !c.in_place;
      if (!a.clears) launch_clear_outputs(a, device.stream);
      for (; a.chunk < c.chunks; ++a.chunk) launch_place(a, c.num_sms, device.stream);
    });
}

template <class T>
Array<T> Trial::gather(size_t stride, const std::vector<Array<T>>& pieces) {
  Array<T> all = make_array<T>(device, stride * pieces.size(), kPoisonWord);
  for (size_t s = 0; s < pieces.size(); ++s)
    EPCOMM_CUDA_TRY(cudaMemcpyAsync(all.data + s * stride, pieces[s].data,
                                    pieces[s].count * sizeof(T), cudaMemcpyDeviceToDevice,
                                    device.stream));
  return all;
}

inline void Trial::place_gathered() {
  const size_t capacity = static_cast<size_t>(w.max_tokens), topk = static_cast<size_t>(c.topk);
  const size_t num_ranks = static_cast<size_t>(c.num_ranks);
  std::vector<Array<char>> x, scales;
  std::vector<Array<int32_t>> ids, row, slot;
  std::vector<Array<float>> weights;
  for (int s = 0; s < c.num_ranks; ++s) {
    const Rank& m = rank(s);
    const size_t tokens = static_cast<size_t>(w.tokens[s]);
    x.push_back(m.x);
    scales.push_back(m.scales);
    weights.push_back(m.weights);
    ids.push_back({m.plan.topk_idx, tokens * topk});
    row.push_back({m.plan.row, tokens * topk});
    slot.push_back({m.plan.slot, tokens * num_ranks});
  }
  GatheredArgs a = {};
  a.capacity = w.max_tokens;
  a.x = gather(capacity * c.row_bytes, x).data;
  a.scales = gather(capacity * c.scale_bytes, scales).data;
  a.topk_idx = gather(capacity * topk, ids).data;
  a.row = gather(capacity * topk, row).data;
  a.slot = gather(capacity * num_ranks, slot).data;
  if (c.weighted) a.topk_weights = gather(capacity * topk, weights).data;
  for (int r = 0; r < c.num_ranks; ++r) {
    rank(r).send_x.clear();
    a.place = place_args(r);
    a.place.clears = true;
    a.announced = rank(r).plan.announced;
    run([&] { launch_place_gathered(a, c.num_sms, device.stream); });
  }
}

inline void Trial::check_place(const std::string& what) {
  for (int r = 0; r < c.num_ranks; ++r) {
    const Received want = w.received(r);
    const Rank& m = rank(r);
    expect_equal(device, want.x, m.recv_x, what + " x", c);
    expect_equal(device, want.scales, m.recv_scales, what + " scales", c);
    expect_equal(device, want.index, m.recv_index, what + " topk_idx", c);
    expect_equal(device, want.meta, m.recv_meta, what + " meta", c);
    if (c.weighted) expect_equal(device, want.weights, m.recv_weights, what + " weights", c);
  }
}

inline PartialArgs Trial::partial_args(int r, int chunk) const {
  const Rank& m = ranks_[static_cast<size_t>(r)];
  PartialArgs a = {};
  a.dims = dims(r);
  a.rank = r;
  a.dtype = c.dtype;
  a.hidden = c.hidden();
  a.chunk = chunk;
  a.chunks = c.chunks;
  for (int s = 0; s < c.num_ranks; ++s)
    a.topk_weights[s] = c.weighted ? ranks_[static_cast<size_t>(s)].weights.data : nullptr;
  a.by_token = c.by_token;
  a.x = m.expert_out.data;
  a.row_capacity = w.row_capacity(r);
  a.max_tokens = w.max_tokens;
  a.plan = m.plan;
  for (size_t s = 0; s < m.partial.size(); ++s) a.target[s] = m.partial[s].data;
  return a;
}

inline SumArgs Trial::sum_args(int s, int chunk) const {
  const Rank& m = ranks_[static_cast<size_t>(s)];
  SumArgs a = {};
  a.dims = dims(s);
  a.rank = s;
  a.dtype = c.dtype;
  a.hidden = c.hidden();
  a.num_tokens = w.tokens[s];
  a.chunk = chunk;
  a.chunks = c.chunks;
  a.plan = m.plan;
  for (int r = 0; r < c.num_ranks; ++r)
    a.partial[r] = ranks_[static_cast<size_t>(r)].partial[static_cast<size_t>(s)].data;
  a.bias = c.bias ? m.bias.data : nullptr;
  a.out = m.out.data;
  return a;
}

inline void Trial::combine() {
  for (int r = 0; r < c.num_ranks; ++r) {
    for (int s = 0; s < c.num_ranks; ++s)
      rank(r).partial.push_back(
          make_array<char>(device, size_t(w.count(s, r)) * c.combine_bytes, kPoisonRow));
    run([&] {
      for (int chunk = 0; chunk < c.chunks; ++chunk) {
        PartialArgs a = partial_args(r, chunk);
        if (chunk > 0) {  // in two parts
          a.sources = uint64_t{1} << r;
          launch_partials(a, c.num_sms, device.stream);
          a.sources = ~a.sources;
        }
        launch_partials(a, c.num_sms, device.stream);
      }
    });
  }
  for (int s = 0; s < c.num_ranks; ++s)
    run([&] {
      for (int chunk = 0; chunk < c.chunks; ++chunk)
        launch_sum(sum_args(s, chunk), c.num_sms, device.stream);
    });
}

inline void Trial::check_combine() {
  for (int r = 0; r < c.num_ranks; ++r) {
    std::vector<Bytes> want(static_cast<size_t>(c.num_ranks));
    for (const Token& t : w.recv[r]) {
      const Bytes row = w.partial(r, t);
      want[t.source].insert(want[t.source].end(), row.begin(), row.end());
    }
    for (int s = 0; s < c.num_ranks; ++s)
      expect_equal(device, want[s], rank(r).partial[s], "partial", c);
  }
  for (int s = 0; s < c.num_ranks; ++s) expect_equal(device, w.sum(s), rank(s).out, "sum", c);
}

// The same by dense partials, summed on the host as a reduce-scatter would, and finish.
inline void Trial::combine_dense() {
  const size_t hidden = static_cast<size_t>(c.hidden()), ranks = static_cast<size_t>(c.num_ranks);
  const size_t capacity = static_cast<size_t>(w.max_tokens);
  std::vector<float> total(ranks * capacity * hidden, 0.0f);
  for (int r = 0; r < c.num_ranks; ++r) {
    const Array<float> dense = make_array<float>(device, total.size(), 0);
    const PartialArgs a = partial_args(r, 0);
    run([&] { launch_dense_partials(a, dense.data, w.max_tokens, c.num_sms, device.stream); });
    std::vector<float> want(total.size(), 0.0f);
    for (const Token& t : w.recv[r]) {
      const Bytes row = w.partial(r, t);
      add_row(c.dtype, row.data(), want.data() + (size_t(t.source) * capacity + t.token) * hidden,
              c.hidden());
    }
    // A row of -0 may stay what it is: equal as numbers is enough here.
    std::vector<float> have(total.size());
    EPCOMM_CUDA_TRY(cudaMemcpyAsync(have.data(), dense.data, have.size() * sizeof(float),
                                    cudaMemcpyDeviceToHost, device.stream));
    EPCOMM_CUDA_TRY(cudaStreamSynchronize(device.stream));
    expect(have == want, "dense partial", c);
    expect_equal(device, {}, Array<float>{dense.data + dense.count, 0, true}, "dense", c);
    for (size_t i = 0; i < total.size(); ++i) total[i] = r == 0 ? have[i] : total[i] + have[i];
  }
  for (int s = 0; s < c.num_ranks; ++s) {
    const auto first = total.begin() + static_cast<ptrdiff_t>(size_t(s) * capacity * hidden);
    const size_t n = static_cast<size_t>(w.tokens[s]) * hidden;
    const Array<float> sum =
        upload(device, std::vector<float>(first, first + static_cast<ptrdiff_t>(n)));
    Rank& m = rank(s);
    const Array<char> out = make_array<char>(device, m.out.count, kPoisonRow);
    run([&] {
      launch_finish(sum.data, c.bias ? m.bias.data : nullptr, out.data, c.dtype,
                    static_cast<int64_t>(n), device.stream);
    });
    expect_equal(device, w.sum(s), out, "finish", c);
  }
}

}  // namespace epcomm::test
