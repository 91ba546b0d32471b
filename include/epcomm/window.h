// Symmetric registered memory: each rank owns one piece, and every rank can address all of them.
#pragma once

#include <cstddef>
#include <memory>

#include "epcomm/bootstrap.h"

namespace epcomm {

/// The memory of a Buffer, addressed (rank, offset). All pieces have the same size.
class Window {
 public:
  virtual ~Window() = default;
  virtual size_t bytes() const = 0;
  /// Address, in this process, of the piece that rank owns. Zero-filled when the window is made.
  virtual char* peer(int rank) const = 0;
  /// The piece of this rank; outlives the Window, the pieces of other ranks do not.
  virtual std::shared_ptr<char> own() const = 0;
  /// False once the process behind rank is known to be gone. True does not prove that it is alive.
  virtual bool alive(int rank) const = 0;
};

/// Collective. Shared memory between processes of one machine: an anonymous memory file passed over
/// a unix socket, so nothing has a name in the file system and nothing outlives its processes.
/// Memory is taken from the machine as it is touched. Threads of one process
/// (Bootstrap::in_process) share one heap block instead. Throws PeerLost if a rank does not answer
/// within timeout_s.
std::unique_ptr<Window> make_host_window(Bootstrap& bootstrap, size_t bytes, double timeout_s);

}  // namespace epcomm
