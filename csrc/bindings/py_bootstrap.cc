#include "bindings/py_bootstrap.h"

#include <cstring>
#include <string>
#include <utility>

#include "epcomm/error.h"

namespace py = pybind11;

namespace epcomm {

PyBootstrap::PyBootstrap(py::object object)
    : object_(std::move(object)),
      rank_(object_.attr("rank").cast<int>()),
      size_(object_.attr("size").cast<int>()) {}

PyBootstrap::~PyBootstrap() {
  py::gil_scoped_acquire gil;
  object_ = py::object();
}

void PyBootstrap::all_gather(const void* in, void* out, size_t bytes) {
  py::gil_scoped_acquire gil;
  const auto all =
      object_.attr("all_gather")(py::bytes(static_cast<const char*>(in), bytes)).cast<py::list>();
  if (static_cast<int>(all.size()) != size_)
    throw Error("bootstrap.all_gather returned " + std::to_string(all.size()) +
                " items; expected " + std::to_string(size_));
  char* to = static_cast<char*>(out);
  for (py::handle item : all) {
    const auto piece = item.cast<std::string>();
    if (piece.size() != bytes)
      throw Error("bootstrap.all_gather returned an item of " + std::to_string(piece.size()) +
                  " bytes; expected " + std::to_string(bytes));
    std::memcpy(to, piece.data(), bytes);
    to += bytes;
  }
}

}  // namespace epcomm
