// A Bootstrap written in Python.
#pragma once

#include <pybind11/pybind11.h>

#include "epcomm/bootstrap.h"

namespace epcomm {

/// Wraps an object with rank, size and all_gather(bytes) -> list of bytes. Takes the GIL where it
/// needs it.
class PyBootstrap final : public Bootstrap {
 public:
  explicit PyBootstrap(pybind11::object object);
  ~PyBootstrap() override;
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void all_gather(const void* in, void* out, size_t bytes) override;

 private:
  pybind11::object object_;
  int rank_, size_;
};

}  // namespace epcomm
