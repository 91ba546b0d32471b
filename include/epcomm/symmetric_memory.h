// A window in device memory by itself: what a Buffer of the nvlink transport keeps its results in.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "epcomm/bootstrap.h"
#include "epcomm/buffer.h"

namespace epcomm {

/// Device memory that all ranks of a group address, handed out in pieces. The GPU is the one that
/// is current when it is made.
class SymmetricMemory {
 public:
  /// Collective. bytes of each rank's memory, rounded up; zero-filled. Throws the same Error on all
  /// ranks if any of them cannot take part, PeerLost if one does not answer within timeout_s.
  SymmetricMemory(Bootstrap& bootstrap, size_t bytes, double timeout_s);
  ~SymmetricMemory();
  SymmetricMemory(const SymmetricMemory&) = delete;
  SymmetricMemory& operator=(const SymmetricMemory&) = delete;

  size_t bytes() const;
  /// Device address, in this process, of the memory that rank owns; valid as long as this object.
  char* peer(int rank) const;
  /// False once the process behind rank is known to be gone.
  bool alive(int rank) const;
  /// "descriptor", "fabric" or "ipc": how the memory was passed on.
  std::string share() const;
  /// A piece of this rank's memory; it stays valid after this object. data == nullptr if there is
  /// no room.
  Allocation allocate(size_t bytes);
  size_t free_bytes() const;  ///< largest piece that is free

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace epcomm
