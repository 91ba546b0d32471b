#include "kernels/token_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace epcomm {
namespace {

struct Piece {
  const char* name;
  size_t offset, bytes;
};

// No two pieces overlap, all start aligned, and all end within the block.
void expect_packed(std::vector<Piece> pieces, size_t begin, size_t end) {
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return a.offset != b.offset ? a.offset < b.offset : a.bytes < b.bytes;
  });
  size_t at = begin;
  for (const Piece& piece : pieces) {
    EXPECT_EQ(piece.offset % kBlockAlignment, 0u) << piece.name;
    EXPECT_GE(piece.offset, at) << piece.name << " overlaps what is in front of it";
    at = piece.offset + piece.bytes;
  }
  EXPECT_LE(at, end);
}

const std::vector<Dims> kDims = {{1, 1, 1, 1},          {2, 3, 2, 2},  {4, 256, 64, 8},
                                 {7, 10, 2, 3},         {4, 5, 0, 32}, {64, 512, 8, 8},
                                 {5, 9, 2, 4, false, 3}};

TEST(TokenLayout, AlignUp) {
  static_assert(align_up(0, 128) == 0 && align_up(1, 128) == 128 && align_up(128, 128) == 128 &&
                align_up(129, 128) == 256);
}

TEST(TokenLayout, PlanSendArraysDoNotOverlap) {
  for (const Dims& d : kDims)
    for (int64_t tokens : {0, 1, 31, 4096}) {
      const PlanSendLayout l(d, tokens);
      auto count = [](int64_t n) { return static_cast<size_t>(n) * sizeof(int32_t); };
      expect_packed({{"topk_idx", l.topk_idx, count(tokens * d.topk)},
                     {"slot", l.slot, count(tokens * d.num_ranks)},
                     {"row", l.row, count(tokens * d.topk)},
                     {"rank_count", l.rank_count, count(d.num_ranks * d.num_ranks)},
                     {"expert_count", l.expert_count, count(d.num_ranks * d.num_experts)},
                     {"expert_offset", l.expert_offset, count(d.local_experts + 1)},
                     {"tokens_per_expert", l.tokens_per_expert, count(d.local_experts)},
                     {"num_recv", l.num_recv, count(1)},
                     {"node_slot", l.node_slot, count(tokens * d.num_nodes)},
                     {"node_count", l.node_count, count(d.num_ranks * d.num_nodes)}},
                    0, l.bytes);
    }
}

// What stays of forwarded rows (ForwardedLayout) lies behind all other arrays.
TEST(TokenLayout, ForwardedRowsHaveTheirWords) {
  const Dims dims{4, 16, 4, 2, true, 2};
  const PlanSendLayout without(dims, 10), with(dims, 10, 70);
  EXPECT_EQ(with.forwarded, without.bytes);
  EXPECT_EQ(with.forwarded % kBlockAlignment, 0u);
  EXPECT_GE(with.bytes, with.forwarded + 70 * sizeof(int32_t));
}

TEST(TokenLayout, SendBlockPointersAreTheOffsets) {
  const PlanSendLayout layout({4, 16, 4, 2, false, 2}, 10, 5);
  std::vector<char> block(layout.bytes);
  PlanView view;
  set_send_block(view, block.data(), layout);
  auto offset = [&](const int32_t* p) {
    return static_cast<size_t>(reinterpret_cast<const char*>(p) - block.data());
  };
  EXPECT_EQ(offset(view.topk_idx), layout.topk_idx);
  EXPECT_EQ(offset(view.slot), layout.slot);
  EXPECT_EQ(offset(view.row), layout.row);
  EXPECT_EQ(offset(view.rank_count), layout.rank_count);
  EXPECT_EQ(offset(view.expert_count), layout.expert_count);
  EXPECT_EQ(offset(view.expert_offset), layout.expert_offset);
  EXPECT_EQ(offset(view.tokens_per_expert), layout.tokens_per_expert);
  EXPECT_EQ(offset(view.num_recv), layout.num_recv);
  EXPECT_EQ(offset(view.node_slot), layout.node_slot);
  EXPECT_EQ(offset(view.node_count), layout.node_count);
  EXPECT_EQ(offset(view.node_token), layout.node_token);
  EXPECT_EQ(offset(view.forwarded), layout.forwarded);
}

// Every word of every record is its own: writing them all and reading them back finds nothing
// changed.
TEST(TokenLayout, MetaRecordsDoNotOverlap) {
  for (int topk : {1, 3, 8, 32}) {
    constexpr int kRecords = 3;
    const MetaLayout meta(topk);
    EXPECT_EQ(meta.record_bytes % 16, 0u);
    std::vector<int32_t> block(kRecords * meta.record_bytes / sizeof(int32_t), -1);
    for (int n = 0; n < kRecords; ++n) {
      for (int k = 0; k < topk; ++k) {
        meta.row(block.data(), n)[k] = 1000 * n + k;
        meta.topk_idx(block.data(), n)[k] = 1000 * n + 100 + k;
        meta.topk_weights(block.data(), n)[k] = static_cast<float>(1000 * n + 200 + k);
      }
      *meta.token(block.data(), n) = 1000 * n + 300;
    }
    for (int n = 0; n < kRecords; ++n) {
      for (int k = 0; k < topk; ++k) {
        EXPECT_EQ(meta.row(block.data(), n)[k], 1000 * n + k);
        EXPECT_EQ(meta.topk_idx(block.data(), n)[k], 1000 * n + 100 + k);
        EXPECT_EQ(meta.topk_weights(block.data(), n)[k], static_cast<float>(1000 * n + 200 + k));
      }
      EXPECT_EQ(*meta.token(block.data(), n), 1000 * n + 300);
    }
  }
}

TEST(TokenLayout, ControlAreaDoesNotOverlap) {
  for (const Dims& d : kDims) {
    const ControlLayout l(d);
    const size_t counts =
        static_cast<size_t>(d.num_ranks + d.num_experts + d.num_nodes) * sizeof(int32_t);
    std::vector<Piece> pieces = {{"header", 0, ControlLayout::kHeaderBytes}};
    for (int source = 0; source < d.num_ranks; ++source) {
      pieces.push_back({"signals", l.inbox(source), ControlLayout::kSignalBytes});
      for (uint64_t epoch : {7, 8}) {
        pieces.push_back({"entry", l.entry(source, epoch), ControlLayout::kEntryBytes});
        pieces.push_back({"counts", l.counts(source, epoch), counts});
      }
    }
    expect_packed(pieces, 0, l.arena);
    EXPECT_EQ(l.arena % 4096, 0u);
    // Epochs of one parity share a slot; neighbours never do.
    EXPECT_EQ(l.entry(0, 1), l.entry(0, 3));
    EXPECT_NE(l.entry(0, 1), l.entry(0, 2));
  }
}

}  // namespace
}  // namespace epcomm
