#include "bindings/quant_bindings.h"

#include "bindings/buffer_bindings.h"

namespace py = pybind11;

namespace epcomm {

void bind_quant(py::module_& m, const QuantFunctions& functions) {
  py::class_<QuantLayout>(m, "QuantLayout", py::module_local())
      .def_readonly("group", &QuantLayout::group)
      .def_readonly("multiple", &QuantLayout::multiple)
      .def_readonly("num_groups", &QuantLayout::num_groups)
      .def_readonly("row_bytes", &QuantLayout::row_bytes)
      .def_readonly("scale_bytes", &QuantLayout::scale_bytes)
      .def_readonly("wire_scale_bytes", &QuantLayout::wire_scale_bytes);
  m.def("quant_layout", &quant_layout);

  py::class_<QuantizeArgs> args(m, "QuantizeArgs", py::module_local());
  args.def(py::init<>())
      .def_readwrite("quant", &QuantizeArgs::quant)
      .def_readwrite("dtype", &QuantizeArgs::dtype)
      .def_readwrite("num_rows", &QuantizeArgs::num_rows)
      .def_readwrite("hidden", &QuantizeArgs::hidden)
      .def_readwrite("global_stride", &QuantizeArgs::global_stride)
      .def_readwrite("wire", &QuantizeArgs::wire)
      .def_readwrite("num_sms", &QuantizeArgs::num_sms)
      .def("set_scale_strides", [](QuantizeArgs& a, int64_t row, int64_t unit, bool swizzled) {
        a.scale_strides = {row, unit, swizzled};
      });
  def_pointer(args, "x", &QuantizeArgs::x);
  def_pointer(args, "q", &QuantizeArgs::q);
  def_pointer(args, "scales", &QuantizeArgs::scales);
  def_pointer(args, "global_scale", &QuantizeArgs::global_scale);
  def_pointer(args, "stream", &QuantizeArgs::stream);

  using gil = py::call_guard<py::gil_scoped_release>;
  m.def("quantize", functions.quantize, gil());
  m.def("dequantize", functions.dequantize, gil());
  m.def(
      "global_scale",
      [run = functions.global_scale](Dtype dtype, uintptr_t x, int64_t count, uintptr_t out,
                                     uintptr_t stream) {
        run(dtype, reinterpret_cast<const void*>(x), count, reinterpret_cast<float*>(out),
            reinterpret_cast<void*>(stream));
      },
      gil());
}

}  // namespace epcomm
