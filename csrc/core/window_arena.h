// The allocatable part of a rank's own piece of a window.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/arena.h"
#include "epcomm/buffer.h"
#include "epcomm/window.h"

namespace epcomm {

/// Hands out this rank's piece of a window from control_bytes on. Each allocation shares ownership
/// of the piece's mapping, so tensors outlive the Buffer that returned them. Host or device memory:
/// nothing here follows an address.
class WindowArena {
 public:
  WindowArena(const Window& window, size_t control_bytes)
      : shared_(std::make_shared<Shared>(window, control_bytes)) {}

  /// data == nullptr if there is no room.
  Allocation allocate(size_t bytes) {
    const auto offset = shared_->pieces.allocate(bytes);
    if (!offset) return {};
    char* data = shared_->base + *offset;
    return {data, bytes, std::shared_ptr<void>(data, [shared = shared_, at = *offset](void*) {
              shared->pieces.free(at);
            })};
  }
  size_t largest_free() const { return shared_->pieces.largest_free(); }
  /// Does [p, p + bytes) lie in the arena?
  bool contains(const void* p, size_t bytes) const {
    const char* begin = static_cast<const char*>(p);
    return begin >= shared_->base && begin <= shared_->end &&
           static_cast<size_t>(shared_->end - begin) >= bytes;
  }

  /// In the window, of memory that contains() says is here; 0 for null.
  uint64_t offset(const void* p) const {
    return p == nullptr ? 0
                        : static_cast<uint64_t>(static_cast<const char*>(p) - shared_->piece.get());
  }

 private:
  struct Shared {
    Shared(const Window& window, size_t control_bytes)
        : piece(window.own()),
          base(piece.get() + control_bytes),
          end(piece.get() + window.bytes()),
          pieces(window.bytes() - control_bytes) {}
    std::shared_ptr<char> piece;
    char *base, *end;
    Arena pieces;
  };
  std::shared_ptr<Shared> shared_;
};

}  // namespace epcomm
