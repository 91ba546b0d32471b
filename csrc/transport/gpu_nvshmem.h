// NVSHMEM, as the host sees it: one job per process, and windows in its symmetric heap. The only
// host code that knows NVSHMEM is gpu_nvshmem.cc; device code: kernels/link_nvshmem.cuh.
//
// The first window initialises NVSHMEM over its group; NVSHMEM has one job per process, for as long
// as the process lives. Later windows may be over any part of that group. NVSHMEM is never
// finalised: that would be collective, and it cannot be initialised again.
#pragma once

#include <cstddef>
#include <memory>

#include "epcomm/bootstrap.h"

namespace epcomm {

/// Symmetric memory of one group of ranks, at one place in the heap of each.
class NvshmemWindow {
 public:
  virtual ~NvshmemWindow() = default;
  /// This rank's memory, zero at first, in device memory.
  virtual char* own() const = 0;
  /// NVSHMEM's number of a rank of the group.
  virtual int pe(int rank) const = 0;
  /// Whether this GPU loads and stores that rank's memory, so that no network card is between them.
  virtual bool mapped(int rank) const = 0;
  /// Peers may still write here when the window ends: its memory is not used again.
  virtual void abandon() = 0;
};

/// Collective, on the GPU that is current. slab_bytes: symmetric memory taken at once when what the
/// job has does not suffice; 0 = as much as this window needs. Throws the same Error on all ranks
/// if a rank is not in the job that others are in, or there is no room.
///
/// NVSHMEM reads its own environment variables. Its initialisation cannot be bounded by a timeout.
std::shared_ptr<NvshmemWindow> make_nvshmem_window(Bootstrap& bootstrap, size_t bytes,
                                                   size_t slab_bytes);

}  // namespace epcomm
