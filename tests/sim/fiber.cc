#include "tests/sim/fiber.h"

#include <sys/mman.h>

#include <new>

namespace epcomm::sim {
namespace {

constexpr uint64_t kGuard = 0x6d1f3c5aa5c3f1d6;
// Stacks at equal offsets in a page would compete for the same sets of the caches.
constexpr size_t kStride = Fiber::kStackBytes + 5 * 64;

thread_local Fiber* entering = nullptr;

}  // namespace

Fiber::Fiber(char* stack) : stack_(stack) {}

void Fiber::reset(Body body, void* argument) {
  if (!ended_) made_ = false;
  body_ = body;
  argument_ = argument;
  ended_ = false;
  *guard() = kGuard;
}

void Fiber::enter() {
  Fiber* self = entering;
  for (;;) {
    self->body_(self->argument_);
    self->ended_ = true;
    self->suspend();
  }
}

// ucontext makes the stack; _setjmp switches, because it does without system calls.
__attribute__((noinline)) bool Fiber::resume() {
  if (_setjmp(outside_) == 0) {
    if (made_) _longjmp(inside_, 1);
    made_ = true;
    entering = this;
    ::getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    ::makecontext(&context_, &Fiber::enter, 0);
    ::setcontext(&context_);
  }
  return *guard() == kGuard;
}

__attribute__((noinline)) void Fiber::suspend() {
  if (_setjmp(inside_) == 0) _longjmp(outside_, 1);
}

FiberPool::~FiberPool() {
  for (void* slab : slabs_) ::munmap(slab, kPerSlab * kStride);
}

Fiber* FiberPool::get() {
  if (free_.empty()) {
    void* slab = ::mmap(nullptr, kPerSlab * kStride, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    slabs_.push_back(slab);
    for (size_t i = 0; i < kPerSlab; ++i) {
      all_.push_back(std::make_unique<Fiber>(static_cast<char*>(slab) + i * kStride));
      free_.push_back(all_.back().get());
    }
  }
  Fiber* fiber = free_.back();
  free_.pop_back();
  return fiber;
}

}  // namespace epcomm::sim
