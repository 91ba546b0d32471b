// The whole API for C++ callers: make a Buffer, then route, dispatch and combine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "epcomm/bootstrap.h"
#include "epcomm/error.h"
#include "epcomm/plan.h"
#include "epcomm/types.h"

namespace epcomm {

class Transport;

/// A piece of this rank's window. The memory returns to the window when the last copy of the
/// pointer goes; it stays readable after Buffer::destroy().
struct Allocation {
  char* data = nullptr;
  size_t bytes = 0;
  std::shared_ptr<void> owner;  ///< keeps the piece and the mapping alive
};

/// The send block of a plan: one piece of memory that the caller provides. Offsets of the arrays
/// that callers read, in bytes; each is int32.
struct SendBlock {
  size_t bytes = 0;
  size_t rank_count = 0;         ///< [num_ranks source, num_ranks destination]
  size_t expert_count = 0;       ///< [num_ranks source, num_experts]
  size_t expert_offset = 0;      ///< [local_experts + 1]
  size_t tokens_per_expert = 0;  ///< [local_experts]
  size_t num_recv = 0;           ///< [1]
};

/// Names of the transports in this build.
std::vector<std::string> transport_names();

/// Collective with the Buffer constructor of the other ranks: tells them that this rank cannot take
/// part, so that they throw InvalidArgument at once instead of waiting. For callers that check
/// options first.
void refuse(Bootstrap& bootstrap, const std::string& why);

/// One rank's end of an expert-parallel group. Collective calls are made by all ranks in the same
/// order; one thread at a time. Every wait is bounded by BufferOptions::timeout_s.
class Buffer {
 public:
  /// Collective. Throws ConfigMismatch (the same on all ranks) if ranks disagree, PeerLost if one
  /// does not show up, InvalidArgument for an option that this rank can refuse alone.
  /// The bootstrap is used here and not kept.
  Buffer(std::shared_ptr<Bootstrap> bootstrap, BufferOptions options);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  /// Throws BufferUnusable after destroy() and in a forked process.
  void check_usable() const;
  /// Throws PeerLost or Evicted if a call that had returned already was cut short since. For
  /// callers that have waited for the end of a GPU call; nothing to report after destroy().
  void check_faults() const;

  int rank() const;
  int num_ranks() const;
  uint64_t id() const;
  const Config& config() const;
  const Caps& caps() const;
  const std::string& transport() const;
  /// Which of its ways the transport took by itself when it was made, and why, for the log; empty =
  /// there was nothing to choose.
  std::string choice() const;
  int local_experts() const;      ///< experts that this rank owns
  int max_local_experts() const;  ///< most experts that any rank owns

  /// Size and offsets of a plan's send block.
  SendBlock send_block(int num_tokens, int topk) const;
  /// A view over a send block, for RouteArgs::plan.
  PlanView view_send_block(void* block, int num_tokens, int topk) const;
  /// Bytes of the records of num_recv received tokens, with which a receive block begins.
  size_t recv_meta_bytes(int topk, int num_recv) const;
  /// Bytes of the plan's receive block (PlanView::recv_meta) with room for num_recv tokens; from
  /// allocate() if caps().symmetric_outputs.
  size_t recv_block_bytes(const Plan& plan, int num_recv) const;
  /// Most tokens, and most rows in the layout, that this rank can receive in one call.
  int64_t max_recv_tokens() const;
  int64_t max_recv_rows(Layout layout, int topk, int expert_alignment) const;

  /// Memory that peers can write. Returns data == nullptr if there is no room.
  Allocation allocate(size_t bytes);
  size_t free_bytes() const;

  /// Collective. Expert ids outside [-1, num_experts) throw InvalidArgument before anything is
  /// sent.
  Plan route(const RouteArgs& args);
  /// A plan of this Buffer from its Plan::state and its send block, or a copy of that. It still
  /// needs a receive block: the plan's own, a copy (to combine), or new memory (to dispatch).
  Plan restore(const std::vector<int64_t>& state, void* send_block) const;
  /// Collective. plan.view must have its receive block attached.
  void dispatch(const Plan& plan, const DispatchArgs& args);
  /// After the first dispatch of a plan that was routed with RouteArgs::ahead: waits for the
  /// counts, which plan.result holds then. False: what some rank received did not fit in the memory
  /// that it had guessed, and nothing was moved; all ranks dispatch again, with memory of the right
  /// size. Throws what route throws about expert ids and about ranks that disagree.
  bool settle(Plan& plan);
  /// Collective. y[t] = (sum over ranks r, ascending, of round(partial)) + bias[t], in fp32,
  /// rounded once to dtype. partial is the sum over the distinct rows of rank r that carry token t;
  /// with topk_weights, the sum over k, ascending, of topk_weights[t, k] * (the row that carries
  /// (t, k)). With by_token the partial of a token is its row of x. A transport that forwards
  /// (caps().forwards) adds the ranks of a node first:
  /// y[t] = (sum over nodes, ascending, of round(sum over ranks r of the node, ascending, of
  /// round(partial))) + bias[t].
  void combine(const Plan& plan, const CombineArgs& args);

  /// What this rank has sent. Throws InvalidArgument unless caps().link_counters.
  LinkCounters link_counters() const;
  void reset_link_counters();

  /// Calls from the next on add to these counters, until they are set again or destroy(). Local.
  /// The caller zeroes them. Throws InvalidArgument unless caps().received_tokens and
  /// caps().wait_times have what is given.
  void set_statistics(const Statistics& statistics);

  /// Local, not collective. Later calls throw BufferUnusable. Allocations stay readable.
  void destroy();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace epcomm
