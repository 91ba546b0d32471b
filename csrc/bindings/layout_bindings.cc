#include "bindings/layout_bindings.h"

#include "bindings/buffer_bindings.h"
#include "epcomm/dispatch_layout.h"

namespace py = pybind11;

namespace epcomm {

void bind_dispatch_layout(py::module_& m) {
  py::class_<DispatchLayoutArgs> args(m, "DispatchLayoutArgs", py::module_local());
  args.def(py::init<>())
      .def_readwrite("index_type", &DispatchLayoutArgs::index_type)
      .def_readwrite("num_tokens", &DispatchLayoutArgs::num_tokens)
      .def_readwrite("topk", &DispatchLayoutArgs::topk)
      .def_readwrite("num_experts", &DispatchLayoutArgs::num_experts)
      .def_readwrite("num_ranks", &DispatchLayoutArgs::num_ranks)
      .def_readwrite("num_nodes", &DispatchLayoutArgs::num_nodes);
  def_pointer(args, "topk_idx", &DispatchLayoutArgs::topk_idx);
  def_pointer(args, "tokens_per_rank", &DispatchLayoutArgs::tokens_per_rank);
  def_pointer(args, "tokens_per_node", &DispatchLayoutArgs::tokens_per_node);
  def_pointer(args, "tokens_per_expert", &DispatchLayoutArgs::tokens_per_expert);
  def_pointer(args, "is_token_in_rank", &DispatchLayoutArgs::is_token_in_rank);
  def_pointer(args, "stream", &DispatchLayoutArgs::stream);
  m.def("dispatch_layout", &dispatch_layout_cuda, py::call_guard<py::gil_scoped_release>());
}

}  // namespace epcomm
