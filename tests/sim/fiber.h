// Fibers: functions that run on stacks of their own and are switched between by one OS thread.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace epcomm::sim {

/// Runs body(argument), again after each reset. Stays on the OS thread that made it.
class Fiber {
 public:
  using Body = void (*)(void* argument);
  static constexpr size_t kStackBytes = 64 << 10;

  /// stack: kStackBytes, left to the caller.
  explicit Fiber(char* stack);
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// The next resume begins body. What ran before is abandoned if it has not returned.
  void reset(Body body, void* argument);
  /// Continues the fiber until it suspends or its body returns. False if it overran its stack.
  bool resume();
  /// Called by the fiber: back to who resumed it.
  void suspend();
  bool ended() const { return ended_; }

 private:
  static void enter();
  uint64_t* guard() const { return reinterpret_cast<uint64_t*>(stack_); }

  char* stack_;
  ucontext_t context_;
  jmp_buf inside_, outside_;
  Body body_ = nullptr;
  void* argument_ = nullptr;
  bool made_ = false;  // inside_ is where to continue
  bool ended_ = true;
};

/// Fibers of one OS thread, kept between grids.
class FiberPool {
 public:
  ~FiberPool();
  Fiber* get();
  void put(Fiber* fiber) { free_.push_back(fiber); }

 private:
  static constexpr size_t kPerSlab = 64;
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_;
  std::vector<void*> slabs_;
};

}  // namespace epcomm::sim
