// Hands out pieces of a fixed range of offsets.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <optional>

namespace epcomm {

/// First-fit allocator over [0, bytes). Keeps no data in the memory that it manages, so the range
/// may be device memory. Thread-safe: tensors are freed by whichever thread drops them.
class Arena {
 public:
  explicit Arena(size_t bytes);

  /// Offset of a piece of at least bytes (rounded up to kGranularity), or nothing if none fits.
  std::optional<size_t> allocate(size_t bytes);
  /// Returns the piece that starts at offset; joins it with free neighbours.
  void free(size_t offset);
  /// Size of the largest free piece.
  size_t largest_free() const;

  static constexpr size_t kGranularity = 512;  ///< bytes; offsets and sizes are multiples

 private:
  mutable std::mutex mutex_;
  std::map<size_t, size_t> free_;  // offset -> bytes, never adjacent
  std::map<size_t, size_t> used_;  // offset -> bytes
};

}  // namespace epcomm
