#include <utility>

#include "core/window_arena.h"
#include "epcomm/symmetric_memory.h"
#include "transport/gpu_window.h"

namespace epcomm {

struct SymmetricMemory::State {
  explicit State(std::unique_ptr<GpuWindow> w) : window(std::move(w)), arena(*window, 0) {}
  std::unique_ptr<GpuWindow> window;
  WindowArena arena;
};

SymmetricMemory::SymmetricMemory(Bootstrap& bootstrap, size_t bytes, double timeout_s)
    : state_(std::make_unique<State>(make_gpu_window(bootstrap, bytes, timeout_s))) {}
SymmetricMemory::~SymmetricMemory() = default;

size_t SymmetricMemory::bytes() const { return state_->window->bytes(); }
char* SymmetricMemory::peer(int rank) const { return state_->window->peer(rank); }
bool SymmetricMemory::alive(int rank) const { return state_->window->alive(rank); }

std::string SymmetricMemory::share() const {
  switch (state_->window->share()) {
    case WindowShare::kDescriptor:
      return "descriptor";
    case WindowShare::kFabric:
      return "fabric";
    case WindowShare::kIpc:
      break;
  }
  return "ipc";
}

Allocation SymmetricMemory::allocate(size_t bytes) { return state_->arena.allocate(bytes); }
size_t SymmetricMemory::free_bytes() const { return state_->arena.largest_free(); }

}  // namespace epcomm
