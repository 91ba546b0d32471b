// How ranks find each other: a few small exchanges while a Buffer is made. Never on the hot path.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace epcomm {

/// A group of ranks that can exchange bytes. Calls are collective and made in the same order
/// everywhere.
class Bootstrap {
 public:
  virtual ~Bootstrap() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Gathers bytes from every rank: out[r * bytes, ...) is rank r's input, on all ranks.
  /// Throws PeerLost (rank -1 where the group cannot tell which) after the group's timeout.
  virtual void all_gather(const void* in, void* out, size_t bytes) = 0;
  /// Returns when every rank has entered.
  virtual void barrier();
  /// True if all ranks are threads of this process, so that plain pointers can be shared.
  virtual bool in_process() const { return false; }
};

/// Ranks as threads of one process: for C++ tests and single-process engines. One Bootstrap per
/// rank, made together; each may be used by one thread.
std::vector<std::shared_ptr<Bootstrap>> make_in_process_bootstraps(int size, double timeout_s);

}  // namespace epcomm
