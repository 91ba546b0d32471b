// A grid of CUDA threads, each a fiber, run by one OS thread in a random order that a seed fixes.
//
// A thread runs until it waits: for its block, its warp, memory that others write (it polls), or
// because it is held back at random. Warps are picked at random; within a warp lanes take turns, so
// they drift apart until a warp collective brings them together.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/sim/bulk_copies.h"
#include "tests/sim/fiber.h"
#include "tests/sim/random.h"

namespace epcomm::sim {

using Where = std::source_location;
class Grid;
struct Block;
struct Warp;

/// What a kernel did wrong, with the state of its grid.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Collective : uint8_t {
  kSync,
  kShuffle,
  kBallot,
  kMatchAny,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kReduceAnd,
  kReduceOr
};

/// One CUDA thread.
struct Thread {
  enum State : uint8_t { kReady, kPolling, kHeldBack, kInBlockBarrier, kInCollective, kEnded };
  /// A plain store that others do not see yet.
  struct DelayedStore {
    void* to;
    alignas(16) char data[16];
  };

  unsigned index = 0;
  int lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  Fiber* fiber = nullptr;
  State state = kReady;
  const char* waits_in = "";  // verb, and who called it
  Where where;

  // Of the collective that the thread is in.
  Collective collective = Collective::kSync;
  uint32_t mask = 0;
  uint64_t value = 0;  // in; then the result
  int source_lane = 0;

  std::vector<DelayedStore> stores;
  uint32_t bulk_groups = 0;  // committed
};

struct Warp {
  Block* block = nullptr;
  Thread* threads = nullptr;  // [32]
  uint32_t live = 0, ready = 0;
  bool queued = false;
  bool slow = false;  // is picked less often
};

/// What the threads of a block tell each other at a barrier.
struct Votes {
  int count = 0;
  int of = 0;
};

struct Block {
  struct SharedVariable {
    const void* id;
    size_t bytes;
    std::unique_ptr<char[]> memory;
    char* data;
  };
  Grid* grid = nullptr;
  unsigned index = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int live = 0, at_barrier = 0;
  Votes votes, result;
  std::unique_ptr<char[]> dynamic_memory;
  char* dynamic = nullptr;
  std::vector<SharedVariable> variables;

  /// Whether all of [p, p + bytes) is shared memory of this block.
  bool owns(const void* p, size_t bytes) const;
};

struct GridShape {
  unsigned blocks, threads;
  size_t shared_bytes;
};

/// Where and how a grid runs.
struct GridSettings {
  int device = 0;
  int num_sms = 1;
  uint64_t seed = 0;
  double limit_s = 60;
  bool any_order = false;  // blocks start at random, not by their index
  bool late_bulk_stores = false;
};

/// How often a grid that runs has let all its threads look at what they wait for, more or less.
using Rounds = std::atomic<uint64_t>;

class Grid {
 public:
  Grid(const GridShape& shape, const GridSettings& settings, std::function<void()> kernel,
       FiberPool& fibers);
  ~Grid();
  /// Until all threads have ended and all they wrote is written. Throws Fault.
  void run();

  const GridShape shape;

  // ---- for the thread that runs ----
  /// Others run before this thread looks again at what it waits for.
  void poll(const char* verb, const Where& where);
  /// Now and then the same, where threads of a real GPU may be overtaken.
  void hold_back();
  Votes sync_block(bool vote, const Where& where);
  /// Returns this lane's result.
  uint64_t meet_warp(Collective collective, uint32_t mask, uint64_t value, int source_lane,
                     const char* verb, const Where& where);
  char* shared_variable(const void* id, size_t bytes);
  /// 16 bytes that others see later, but before what this thread releases after them.
  void store_late(void* to, const void* data);
  void flush_stores();
  [[noreturn]] void fail(const std::string& what, const Where& where);
  BulkCopies copies;

 private:
  void start_block();
  void end_block(Block& block);
  void run_warp(Warp& warp);
  void run_thread(Thread& thread);
  void end_thread(Thread& thread);
  void ready(Warp& warp, uint32_t lanes);
  Warp& pick();
  void suspend(Thread& thread, Thread::State state, const char* verb, const Where& where);
  void release_block_if_complete(Block& block);
  void release_warp_if_complete(Warp& warp, uint32_t mask);
  void idle();
  void let_others_look() const;
  std::string describe(const std::string& what) const;
  int max_resident() const;

  GridSettings settings_;
  std::function<void()> kernel_;
  FiberPool& fibers_;
  Random random_;
  std::vector<std::unique_ptr<Block>> blocks_;  // resident
  std::vector<Warp*> runnable_;
  std::vector<Thread::DelayedStore> unseen_;  // of threads that have ended
  std::vector<unsigned> to_start_;            // the next one last
  unsigned ended_ = 0;
  size_t idle_picks_ = 0, idle_rounds_ = 0;
  uint64_t steps_ = 0;
  std::shared_ptr<Rounds> rounds_;
  std::chrono::steady_clock::time_point begin_;
  std::string fault_;
  // How this grid behaves: one in so many.
  uint32_t copy_steps_, hold_back_steps_, late_stores_;
};

/// The thread that this OS thread runs.
inline thread_local Thread* current_thread = nullptr;
inline Thread& self() { return *current_thread; }
inline Grid& grid() { return *current_thread->block->grid; }

}  // namespace epcomm::sim
