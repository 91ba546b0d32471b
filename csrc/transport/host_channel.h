// Signals between the ranks of one machine, in the control area of a host window.
//
// Every collective call has an epoch, counted alike on all ranks. A rank *enters* a call by writing
// an Entry (what it is about to do and where its results shall land) and its counts into its inbox
// in every window, then it signals; it is *done* with a peer when it has written all that the peer
// waits for. Between the two, transports that move rows in stages signal each chunk of a stage.
//
// Memory order: signal() stores with release after the plain stores that it covers; reached() loads
// with acquire before the plain loads. Entries alternate between
// two slots: a source can be at most one call ahead, because it cannot finish call e + 1 before
// this rank has entered e + 1, and this rank enters e + 1 only after it has read everything of e.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "epcomm/bootstrap.h"
#include "epcomm/error.h"
#include "epcomm/types.h"
#include "epcomm/window.h"
#include "kernels/node_layout.h"
#include "kernels/token_layout.h"

namespace epcomm {

/// What all ranks must do alike in one call; compared before any row is written.
struct CallSignature {
  Operation operation = Operation::kInit;
  Layout layout = Layout::kUnset;
  Dtype dtype = Dtype::kUnset;
  int32_t topk = 0;
  int32_t expert_alignment = 0;
  int32_t row_bytes = 0;
  int32_t scale_bytes = 0;
  int32_t weighted = 0;
  int32_t by_token = 0;        ///< of a combine
  Quant quant = Quant::kNone;  ///< of a combine; a dispatch may move what others quantised before
  int32_t plan = 0;            ///< of a dispatch or combine: epoch in which its plan was routed
};

/// What a rank announces when it enters a call. Offsets are in its own window.
struct Entry {
  CallSignature signature;
  uint64_t rows = 0;     ///< dispatch: recv_x; combine: partial rows
  uint64_t scales = 0;   ///< dispatch: recv_scales
  uint64_t meta = 0;     ///< dispatch: recv_meta
  uint64_t weights = 0;  ///< combine: topk_weights of this rank's tokens
  uint64_t forward = 0;  ///< dispatch: rows that wait to be forwarded
  uint64_t full = 0;     ///< 1 = no room: needed_bytes and free_bytes say why
  uint64_t needed_bytes = 0;
  uint64_t free_bytes = 0;
};
static_assert(sizeof(Entry) <= ControlLayout::kEntryBytes);

/// What a rank tells a peer of its progress in a call: how many chunks of a stage it has written.
enum class Stage {
  kEntered,   ///< 0 chunks: the entry is there
  kDone,      ///< 0 chunks: nothing more comes from this rank
  kRailOut,   ///< rows for the ranks of a node, to the rank that forwards them
  kNodeOut,   ///< what was forwarded, inside the node
  kNodeBack,  ///< rows to be added up, inside the node
  kRailBack,  ///< sums, to the source of the tokens
};
constexpr int kNumStages = 6;

class HostChannel {
 public:
  HostChannel(Bootstrap& bootstrap, Window& window, const Dims& dims, double timeout_s);

  /// Number of the call that runs, or ran last.
  uint64_t epoch() const { return epoch_; }
  /// Starts the next call. Throws at once if a peer was lost before, or gave this rank up.
  void begin(Operation operation);
  /// Statistics::max_wait_ns.
  void set_max_wait_ns(int64_t* max_wait_ns) { max_wait_ns_ = max_wait_ns; }
  /// Announces this rank's entry (and counts, if not null) to all, waits for all, and checks that
  /// all announce the same call (ConfigMismatch) and have room (WindowFull).
  void enter_all(const Entry& entry, const int32_t* counts);
  /// What peer announced for this call.
  const Entry& entry(int peer) const;
  const int32_t* counts(int peer) const;
  /// Tells peer that so many chunks of a stage of this call are written.
  void signal(int peer, Stage stage, int32_t chunks = 0);
  /// True once source has told so.
  bool reached(int source, Stage stage, int32_t chunks = 0) const;
  /// Returns when ready() holds. Every rank must signal kDone to every other in the end: who has
  /// not holds the wait up.
  void wait_until(const std::function<bool()>& ready) { wait_until(ready, Stage::kDone); }
  /// Tells peer that nothing more comes from this rank in this call.
  void signal_done(int peer) { signal(peer, Stage::kDone); }
  /// Returns when every peer has told so.
  void wait_all_done() { wait_all(Stage::kDone); }

 private:
  struct Inbox;
  struct Header;
  Inbox& inbox(int owner, int source) const;
  Header& header(int owner) const;
  void ring(int peer);
  void wait_until(const std::function<bool()>& ready, Stage last);
  void wait_all(Stage stage);
  void show_up();
  int longest_unseen(Stage last) const;
  void check_faults();
  [[noreturn]] void give_up(int peer, const char* why);

  Window& window_;
  ControlLayout layout_;
  int rank_, num_ranks_;
  double timeout_s_;
  Operation operation_ = Operation::kInit;
  uint64_t epoch_ = 0;
  int64_t* max_wait_ns_ = nullptr;
};

}  // namespace epcomm
