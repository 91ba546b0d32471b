// What the routing and row kernels must give, by plain host code over all ranks at once, written
// from the documents of kernels.h, token_layout.h and Buffer. Slow and simple.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "core/host_rows.h"
#include "epcomm/types.h"
#include "kernels/kernels.h"

namespace epcomm::test {

constexpr int kPoisonRow = 0xff;   // NaN in every element type
constexpr int kPoisonWord = 0xa5;  // no valid index: -1 is one

using Bytes = std::vector<char>;
using Ints = std::vector<int32_t>;

struct Case {
  int num_ranks, num_experts, topk, tokens;
  Layout layout = Layout::kToken;
  IndexType index_type = IndexType::kInt64;
  Dtype dtype = Dtype::kBfloat16;  // of the combine
  int chunks = 1, alignment = 1;
  int row_bytes = 16, scale_bytes = 0;
  int combine_bytes = 16;
  int num_sms = 0;
  bool table = false;    // owners of experts at random
  bool weighted = true;  // topk_weights in both directions
  bool bias = false;
  bool by_token = false;  // combine of one row per received token; not weighted
  bool exact = false;     // capacities as counted, not the worst case
  bool bad_ids = false;
  bool in_place = false;  // layout kToken: packed straight into the received tensor
  bool plain = false;     // all ranks have all tokens, no holes: for timing
  bool graph = false;     // launches are captured and replayed
  unsigned seed = 0;

  int hidden() const { return combine_bytes / dtype_bytes(dtype); }
};

struct Token {
  int source, token;
};

// What a rank has after a dispatch.
struct Received {
  Bytes x, scales, index, weights, meta;
};

// Rows, scales and records that one rank packs for another.
struct Packed {
  Bytes x, scales, meta;
};

// All ranks: their inputs at random, and the routing that must come of them. Vectors are by rank.
struct World {
  explicit World(const Case& c);

  Case c;
  int max_tokens;
  Ints owner, local, num_local, tokens;
  std::vector<std::vector<int64_t>> raw_ids;
  std::vector<Ints> ids;
  std::vector<Bytes> x, scales, bias, expert_out;
  std::vector<std::vector<float>> weights;

  std::vector<Ints> announce, slot, row, expert_offset, tokens_per_expert;
  Ints rank_count, expert_count;
  std::vector<std::vector<Token>> recv;  // in order of received tokens
  Ints num_rows;                         // of the layout

  int count(int source, int destination) const {
    return rank_count[static_cast<size_t>(source * c.num_ranks + destination)];
  }
  // First received token of source at destination; place of destination's tokens in source's list.
  int recv_base(int source, int destination) const {
    int sum = 0;
    for (int s = 0; s < source; ++s) sum += count(s, destination);
    return sum;
  }
  int send_base(int source, int destination) const {
    int sum = 0;
    for (int r = 0; r < destination; ++r) sum += count(source, r);
    return sum;
  }
  int recv_capacity(int r) const {
    return c.exact ? static_cast<int>(recv[r].size()) : c.num_ranks * max_tokens;
  }
  int row_capacity(int r) const {
    if (c.layout == Layout::kToken) return recv_capacity(r);
    if (c.layout == Layout::kPadded) return num_local[r] * c.num_ranks * max_tokens;
    return num_rows[r] + (c.exact ? 0 : 37);
  }
  // Row of the layout of rank r that carries slot k of a token, -1 = none.
  int row_at(int r, const Token& t, int k) const {
    const int e = ids[t.source][t.token * c.topk + k];
    return e >= 0 && owner[e] == r ? row[t.source][t.token * c.topk + k] : -1;
  }
  Ints distinct_rows(int r, const Token& t) const {
    Ints rows;
    for (int k = 0; k < c.topk; ++k)
      if (const int n = row_at(r, t, k);
          n >= 0 && std::find(rows.begin(), rows.end(), n) == rows.end())
        rows.push_back(n);
    return rows;
  }

  // Index of a token among those that rank r receives, which lie by source, then token.
  int received_token(int r, const Token& t) const {
    const auto before = [](const Token& a, const Token& b) {
      return a.source != b.source ? a.source < b.source : a.token < b.token;
    };
    return static_cast<int>(std::lower_bound(recv[r].begin(), recv[r].end(), t, before) -
                            recv[r].begin());
  }

  Packed packed(int s, int r) const;
  Received received(int r) const;
  Bytes partial(int r, const Token& t) const;  // one row
  Bytes sum(int s) const;

 private:
  std::mt19937_64 rng_;
  int below(int n) { return static_cast<int>(rng_() % static_cast<uint64_t>(n)); }
  void make_experts();
  void make_inputs();
  void make_elements(Bytes& rows);
  void route();
  void make_announce();
  void write_record(char* record, int r, const Token& t) const;
};

inline World::World(const Case& c_) : c(c_), max_tokens(c_.tokens), rng_(c_.seed) {
  max_tokens = std::max(1, c.tokens + below(3));
  make_experts();
  make_inputs();
  route();
  make_announce();
  expert_out.resize(c.num_ranks);
  for (int r = 0; r < c.num_ranks; ++r) {
    expert_out[r].resize(static_cast<size_t>(row_capacity(r)) * c.combine_bytes);
    make_elements(expert_out[r]);
  }
}

inline void World::make_experts() {
  const int each = (c.num_experts + c.num_ranks - 1) / c.num_ranks;
  num_local.assign(c.num_ranks, 0);
  for (int e = 0; e < c.num_experts; ++e) {
    owner.push_back(c.table ? below(c.num_ranks) : e / each);
    local.push_back(num_local[owner[e]]++);
  }
}

// Finite elements: ordinary ones, subnormals and -0.
inline void World::make_elements(Bytes& rows) {
  const int size = dtype_bytes(c.dtype);
  for (size_t i = 0; i < rows.size(); i += size) {
    const float f = static_cast<float>(below(8001) - 4000) / 1000.0f;
    round_row(c.dtype, &f, rows.data() + i, 1);
    const int kind = below(16);
    if (kind == 0) std::memset(rows.data() + i, 0, size);
    if (kind < 2) rows[i + size - 1] = static_cast<char>(0x80);    // -0, or negative and tiny
    if (kind == 2) std::memset(rows.data() + i + size - 1, 0, 1);  // tiny
  }
}

inline void World::make_inputs() {
  tokens.resize(c.num_ranks);
  for (int s = 0; s < c.num_ranks; ++s) {
    const int kind = below(4);
    const int n = s == 0 || kind == 0 || c.plain ? c.tokens : kind == 1 ? 0 : below(c.tokens + 1);
    tokens[s] = n;
    auto& raw = raw_ids.emplace_back();
    auto& clean = ids.emplace_back();
    auto& w = weights.emplace_back();
    for (int t = 0; t < n; ++t)
      for (int k = 0; k < c.topk; ++k) {
        const int what = c.plain ? 19 : below(20);
        int64_t id = what < 2 ? -1 : below(c.num_experts);
        if (what == 2 && k > 0) id = raw[raw.size() - 1 - below(k)];
        if (c.bad_ids && below(50) == 0) {
          const int64_t bad[] = {c.num_experts, -2, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN};
          id = bad[below(c.index_type == IndexType::kInt64 ? 6 : 4)];
        }
        raw.push_back(id);
        clean.push_back(id < 0 || id >= c.num_experts ? -1 : static_cast<int32_t>(id));
        w.push_back(static_cast<float>(below(2001) - 700) / 997.0f);
      }
    auto random_bytes = [&](size_t bytes) {
      Bytes b(bytes);
      for (char& byte : b) byte = static_cast<char>(below(255));
      return b;
    };
    x.push_back(random_bytes(static_cast<size_t>(n) * c.row_bytes));
    scales.push_back(random_bytes(static_cast<size_t>(n) * c.scale_bytes));
    make_elements(bias.emplace_back(static_cast<size_t>(n) * c.combine_bytes));
  }
}

inline void World::route() {
  const int R = c.num_ranks, K = c.topk;
  rank_count.assign(R * R, 0);
  expert_count.assign(R * c.num_experts, 0);
  recv.resize(R);
  num_rows.assign(R, 0);
  std::vector<std::vector<Token>> members(c.num_experts);  // each token once
  std::vector<std::vector<Ints>> sent(R, std::vector<Ints>(R));
  for (int s = 0; s < R; ++s) {
    slot.emplace_back(tokens[s] * R, -1);
    row.emplace_back(tokens[s] * K, -1);
    for (int t = 0; t < tokens[s]; ++t)
      for (int k = 0; k < K; ++k) {
        const int e = ids[s][t * K + k];
        if (e < 0) continue;
        const int r = owner[e];
        if (slot[s][t * R + r] < 0) {
          slot[s][t * R + r] = static_cast<int>(recv[r].size());
          recv[r].push_back({s, t});
          sent[s][r].push_back(t);
          ++rank_count[s * R + r];
        }
        auto& m = members[e];
        if (!m.empty() && m.back().source == s && m.back().token == t) continue;
        m.push_back({s, t});
        ++expert_count[s * c.num_experts + e];
      }
  }
  std::vector<int> end(R, 0);
  expert_offset.resize(R);
  tokens_per_expert.resize(R);
  for (int e = 0; e < c.num_experts; ++e) {
    const int r = owner[e];
    const bool padded = c.layout == Layout::kPadded;
    if (padded) end[r] = local[e] * R * max_tokens;
    expert_offset[r].push_back(end[r]);
    tokens_per_expert[r].push_back(static_cast<int>(members[e].size()));
    for (size_t i = 0; i < members[e].size(); ++i) {
      const Token& m = members[e][i];
      for (int k = 0; k < K; ++k)
        if (ids[m.source][m.token * K + k] == e)
          row[m.source][m.token * K + k] = c.layout == Layout::kToken
                                               ? slot[m.source][m.token * R + r]
                                               : end[r] + static_cast<int>(i);
    }
    const int n = static_cast<int>(members[e].size());
    end[r] += padded ? R * max_tokens : (n + c.alignment - 1) / c.alignment * c.alignment;
  }
  for (int r = 0; r < R; ++r) {
    expert_offset[r].push_back(end[r]);
    num_rows[r] = c.layout == Layout::kToken ? static_cast<int>(recv[r].size()) : end[r];
  }
}

inline void World::make_announce() {
  const int R = c.num_ranks;
  const AnnounceLayout layout{R, c.num_experts};
  for (int s = 0; s < R; ++s) {
    Ints a(layout.words(), 0);
    a[AnnounceLayout::kNumTokens] = tokens[s];
    for (size_t i = 0; i < raw_ids[s].size(); ++i) {
      const int64_t id = raw_ids[s][i];
      if (id >= -1 && id < c.num_experts) continue;
      a[AnnounceLayout::kBadIndex] = static_cast<int>(i) + 1;
      a[AnnounceLayout::kBadValue] =
          static_cast<int32_t>(std::clamp<int64_t>(id, INT32_MIN, INT32_MAX));
      break;
    }
    for (int i = 0; i < AnnounceLayout::kSignatureWords; ++i)
      a[AnnounceLayout::kSignature + i] = 1000 + i;
    for (int r = 0; r < R; ++r) {
      a[layout.rank_count() + r] = count(s, r);
      for (int chunk = 0; chunk < c.chunks; ++chunk)
        for (int64_t t = chunk_begin(tokens[s], c.chunks, chunk);
             t < chunk_begin(tokens[s], c.chunks, chunk + 1); ++t)
          a[layout.chunk_count(chunk) + r] += slot[s][t * R + r] >= 0;
    }
    for (int e = 0; e < c.num_experts; ++e)
      a[layout.expert_count() + e] = expert_count[s * c.num_experts + e];
    announce.push_back(a);
  }
}

inline void World::write_record(char* record, int r, const Token& t) const {
  const MetaLayout meta(c.topk);
  for (int k = 0; k < c.topk; ++k) {
    meta.row(record, 0)[k] = row_at(r, t, k);
    meta.topk_idx(record, 0)[k] = ids[t.source][t.token * c.topk + k];
    if (c.weighted) meta.topk_weights(record, 0)[k] = weights[t.source][t.token * c.topk + k];
  }
  *meta.token(record, 0) = t.token;
}

inline Packed World::packed(int s, int r) const {
  const size_t record_bytes = MetaLayout(c.topk).record_bytes, n = count(s, r);
  Packed p;
  p.x.resize(n * c.row_bytes);
  p.scales.resize(n * c.scale_bytes);
  p.meta.assign(n * record_bytes, static_cast<char>(kPoisonWord));
  size_t i = 0;
  for (const Token& t : recv[r]) {
    if (t.source != s) continue;
    std::memcpy(p.x.data() + i * c.row_bytes, x[s].data() + size_t(t.token) * c.row_bytes,
                c.row_bytes);
    if (c.scale_bytes != 0)
      std::memcpy(p.scales.data() + i * c.scale_bytes,
                  scales[s].data() + size_t(t.token) * c.scale_bytes, c.scale_bytes);
    write_record(p.meta.data() + i * record_bytes, r, t);
    ++i;
  }
  return p;
}

inline Received World::received(int r) const {
  const bool by_token = c.layout == Layout::kToken;
  const size_t record_bytes = MetaLayout(c.topk).record_bytes, rows = row_capacity(r);
  const size_t entries = by_token ? size_t(recv_capacity(r)) * c.topk : rows;
  const size_t index_bytes = static_cast<size_t>(c.index_type);
  Received out;
  out.x.assign(rows * c.row_bytes, static_cast<char>(kPoisonRow));
  out.scales.assign(rows * c.scale_bytes, static_cast<char>(kPoisonRow));
  out.index.assign(entries * index_bytes, static_cast<char>(0xff));
  out.meta.assign(size_t(recv_capacity(r)) * record_bytes, static_cast<char>(kPoisonWord));
  std::vector<float> w(entries, 0.0f);
  for (size_t n = 0; n < recv[r].size(); ++n) {
    const Token& t = recv[r][n];
    write_record(out.meta.data() + n * record_bytes, r, t);
    for (int k = 0; k < c.topk; ++k) {
      const int at = row_at(r, t, k);
      if (at < 0) continue;
      const size_t entry = by_token ? n * c.topk + k : size_t(at);
      const int64_t id = local[ids[t.source][t.token * c.topk + k]];
      std::memcpy(out.index.data() + entry * index_bytes, &id, index_bytes);  // little endian
      w[entry] += weights[t.source][t.token * c.topk + k];
      std::memcpy(out.x.data() + size_t(at) * c.row_bytes,
                  x[t.source].data() + size_t(t.token) * c.row_bytes, c.row_bytes);
      if (c.scale_bytes != 0)
        std::memcpy(out.scales.data() + size_t(at) * c.scale_bytes,
                    scales[t.source].data() + size_t(t.token) * c.scale_bytes, c.scale_bytes);
    }
  }
  out.weights.resize(entries * sizeof(float));
  if (entries != 0) std::memcpy(out.weights.data(), w.data(), out.weights.size());
  return out;
}

inline Bytes World::partial(int r, const Token& t) const {
  std::vector<float> sum(c.hidden(), 0.0f);
  auto at = [&](int n) { return expert_out[r].data() + size_t(n) * c.combine_bytes; };
  const Ints rows = c.by_token ? Ints{received_token(r, t)} : distinct_rows(r, t);
  if (!c.weighted && rows.size() == 1) return Bytes(at(rows[0]), at(rows[0]) + c.combine_bytes);
  if (c.weighted) {
    for (int k = 0; k < c.topk; ++k)
      if (const int n = row_at(r, t, k); n >= 0)
        add_weighted_row(c.dtype, at(n), weights[t.source][t.token * c.topk + k], sum.data(),
                         c.hidden());
  } else {
    for (const int n : rows) add_row(c.dtype, at(n), sum.data(), c.hidden());
  }
  Bytes out(c.combine_bytes);
  round_row(c.dtype, sum.data(), out.data(), c.hidden());
  return out;
}

inline Bytes World::sum(int s) const {
  Bytes out(size_t(tokens[s]) * c.combine_bytes);
  for (int t = 0; t < tokens[s]; ++t) {
    std::vector<float> sum(c.hidden(), 0.0f);
    for (int r = 0; r < c.num_ranks; ++r)
      if (slot[s][t * c.num_ranks + r] >= 0)
        add_row(c.dtype, partial(r, {s, t}).data(), sum.data(), c.hidden());
    const size_t at = size_t(t) * c.combine_bytes;
    if (c.bias) add_row(c.dtype, bias[s].data() + at, sum.data(), c.hidden());
    round_row(c.dtype, sum.data(), out.data() + at, c.hidden());
  }
  return out;
}

}  // namespace epcomm::test
