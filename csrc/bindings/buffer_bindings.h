// The Python view of epcomm::Buffer, shared by the extension modules (each holds other transports).
#pragma once

#include <pybind11/pybind11.h>

namespace epcomm {

/// Adds Buffer, Plan and the argument structs to a module.
void bind_buffer(pybind11::module_& m);

}  // namespace epcomm
