// The memory of a torch.cuda.MemPool over a window: torch's allocator asks the functions
// epcomm_pool_alloc and epcomm_pool_free (torch.cuda.memory.CUDAPluggableAllocator) for segments.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <functional>

#include "epcomm/buffer.h"

namespace epcomm {

/// Segments that this thread asks for come from allocate; null = there are none to be had. The
/// functions that torch calls take no argument of ours, so this is how they learn it.
void set_pool_source(std::function<Allocation(size_t)> allocate);

/// Adds what python/epcomm/symmetric.py needs of a module whose Buffers return memory of a window.
void bind_torch_pool(pybind11::module_& m);

}  // namespace epcomm
