// The Python view of epcomm::Buffer, shared by the extension modules (each holds other transports).
#pragma once

#include <pybind11/pybind11.h>

namespace epcomm {

/// Tensor addresses cross as integers; 0 is null.
template <class Class, class Struct, class Pointer>
void def_pointer(Class& cls, const char* name, Pointer Struct::* member) {
  cls.def_property(
      name, [member](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*member); },
      [member](Struct& s, uintptr_t p) { s.*member = reinterpret_cast<Pointer>(p); });
}

/// Adds Buffer, Plan and the argument structs to a module.
void bind_buffer(pybind11::module_& m);

}  // namespace epcomm
