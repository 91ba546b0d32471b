// dispatch_layout for Python, in modules that have its kernel.
#pragma once

#include <pybind11/pybind11.h>

namespace epcomm {

/// Adds DispatchLayoutArgs and dispatch_layout to a module. After bind_buffer.
void bind_dispatch_layout(pybind11::module_& m);

}  // namespace epcomm
