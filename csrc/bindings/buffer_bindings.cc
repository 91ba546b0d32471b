#include "bindings/buffer_bindings.h"

#include <pybind11/stl.h>

#include <exception>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "bindings/py_bootstrap.h"
#include "epcomm/buffer.h"
#include "epcomm/error.h"

namespace py = pybind11;

namespace epcomm {
namespace {

// Exceptions are the classes of epcomm.errors, made with their fields.
template <class... Args>
void raise(const char* name, const std::string& text, Args&&... fields) {
  const py::object type = py::module_::import("epcomm.errors").attr(name);
  const py::object error = type(text, std::forward<Args>(fields)...);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(std::exception_ptr p) {
  try {
    std::rethrow_exception(p);
  } catch (const PeerLost& e) {
    raise("PeerLost", e.what(), e.rank, operation_name(e.operation), e.epoch);
  } catch (const Evicted& e) {
    raise("Evicted", e.what(), e.by_rank, operation_name(e.operation), e.epoch);
  } catch (const ConfigMismatch& e) {
    raise("ConfigMismatch", e.what(), e.field, e.value_per_rank);
  } catch (const WindowFull& e) {
    raise("WindowFull", e.what(), e.rank, e.needed_bytes, e.free_bytes);
  } catch (const BufferUnusable& e) {
    raise("BufferUnusable", e.what());
  } catch (const Error& e) {
    raise("Error", e.what());
  }
}

// The quantisations of a set of Caps.
std::vector<Quant> quants(uint32_t bits) {
  std::vector<Quant> out;
  for (Quant q : {Quant::kFp8, Quant::kFp8Ue8m0, Quant::kNvfp4})
    if ((bits & Caps::bit(q)) != 0) out.push_back(q);
  return out;
}

void bind_types(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype", py::module_local())
      .value("bfloat16", Dtype::kBfloat16)
      .value("float16", Dtype::kFloat16)
      .value("float32", Dtype::kFloat32)
      .value("float8_e4m3fn", Dtype::kFloat8E4M3)
      .value("uint8", Dtype::kUint8);
  py::enum_<Layout>(m, "Layout", py::module_local())
      .value("token", Layout::kToken)
      .value("expert", Layout::kExpert)
      .value("padded", Layout::kPadded);
  py::enum_<Quant>(m, "Quant", py::module_local())
      .value("fp8", Quant::kFp8)
      .value("fp8_ue8m0", Quant::kFp8Ue8m0)
      .value("nvfp4", Quant::kNvfp4);
  py::enum_<IndexType>(m, "IndexType", py::module_local())
      .value("int32", IndexType::kInt32)
      .value("int64", IndexType::kInt64);
  py::enum_<Phase>(m, "Phase", py::module_local())
      .value("all", Phase::kAll)
      .value("send", Phase::kSend)
      .value("receive", Phase::kReceive);
  py::class_<Caps>(m, "Caps", py::module_local())
      .def_readonly("token_layout", &Caps::token_layout)
      .def_readonly("expert_layout", &Caps::expert_layout)
      .def_readonly("padded_layout", &Caps::padded_layout)
      .def_readonly("symmetric_outputs", &Caps::symmetric_outputs)
      .def_readonly("graph_capture", &Caps::graph_capture)
      .def_readonly("cuda", &Caps::cuda)
      .def_property_readonly("fused_quants", [](const Caps& c) { return quants(c.fused_quants); })
      .def_property_readonly("combine_quants",
                             [](const Caps& c) { return quants(c.combine_quants); })
      .def_readonly("two_phases", &Caps::two_phases)
      .def_readonly("small_batches", &Caps::small_batches)
      .def_readonly("link_counters", &Caps::link_counters)
      .def_readonly("sends_ahead", &Caps::sends_ahead)
      .def_readonly("forwards", &Caps::forwards)
      .def_readonly("received_tokens", &Caps::received_tokens)
      .def_readonly("wait_times", &Caps::wait_times)
      .def_readonly("column_scales", &Caps::column_scales);
  py::class_<LinkTraffic>(m, "LinkTraffic", py::module_local())
      .def_readonly("rows", &LinkTraffic::rows)
      .def_readonly("bytes", &LinkTraffic::bytes)
      .def_readonly("meta_bytes", &LinkTraffic::meta_bytes);
  py::class_<OperationTraffic>(m, "OperationTraffic", py::module_local())
      .def_readonly("local", &OperationTraffic::local)
      .def_readonly("node", &OperationTraffic::node)
      .def_readonly("rail", &OperationTraffic::rail);
  py::class_<LinkCounters>(m, "LinkCounters", py::module_local())
      .def_readonly("dispatch", &LinkCounters::dispatch)
      .def_readonly("combine", &LinkCounters::combine);
  py::class_<SendBlock>(m, "SendBlock", py::module_local())
      .def_readonly("bytes", &SendBlock::bytes)
      .def_readonly("rank_count", &SendBlock::rank_count)
      .def_readonly("expert_count", &SendBlock::expert_count)
      .def_readonly("expert_offset", &SendBlock::expert_offset)
      .def_readonly("tokens_per_expert", &SendBlock::tokens_per_expert)
      .def_readonly("num_recv", &SendBlock::num_recv);
}

// What a routing announces of the rows that will move by it.
RouteArgs route_of(const DispatchArgs& dispatch) {
  RouteArgs args;
  args.dtype = dispatch.dtype;
  args.row_bytes = dispatch.row_bytes;
  args.scale_bytes = dispatch.scale_bytes;
  args.weighted = dispatch.topk_weights != nullptr;
  args.stream = dispatch.stream;
  return args;
}

void bind_route_args(py::module_& m) {
  py::class_<RouteArgs> route(m, "RouteArgs", py::module_local());
  route.def(py::init(&route_of))
      .def_readwrite("index_type", &RouteArgs::index_type)
      .def_readwrite("num_tokens", &RouteArgs::num_tokens)
      .def_readwrite("topk", &RouteArgs::topk)
      .def_readwrite("layout", &RouteArgs::layout)
      .def_readwrite("expert_alignment", &RouteArgs::expert_alignment)
      .def_readwrite("host_sync", &RouteArgs::host_sync)
      .def_readwrite("ahead", &RouteArgs::ahead);
  def_pointer(route, "topk_idx", &RouteArgs::topk_idx);
}

void bind_args(py::module_& m) {
  py::class_<DispatchArgs> dispatch(m, "DispatchArgs", py::module_local());
  dispatch.def(py::init<>())
      .def_readwrite("dtype", &DispatchArgs::dtype)
      .def_readwrite("row_bytes", &DispatchArgs::row_bytes)
      .def_readwrite("scale_bytes", &DispatchArgs::scale_bytes)
      .def_readwrite("quant", &DispatchArgs::quant)
      .def_readwrite("x_dtype", &DispatchArgs::x_dtype)
      .def_readwrite("index_type", &DispatchArgs::index_type)
      .def_readwrite("replay", &DispatchArgs::replay)
      .def_readwrite("recv_capacity", &DispatchArgs::recv_capacity)
      .def_readwrite("row_capacity", &DispatchArgs::row_capacity)
      .def_readwrite("scale_column_bytes", &DispatchArgs::scale_column_bytes)
      .def_readwrite("needed_bytes", &DispatchArgs::needed_bytes)
      .def_readwrite("free_bytes", &DispatchArgs::free_bytes)
      .def_readwrite("phase", &DispatchArgs::phase)
      .def_property_readonly("whole", [](const DispatchArgs& a) { return a.phase == Phase::kAll; })
      .def_readwrite("num_sms", &DispatchArgs::num_sms);
  def_pointer(dispatch, "x", &DispatchArgs::x);
  def_pointer(dispatch, "scales", &DispatchArgs::scales);
  def_pointer(dispatch, "global_scale", &DispatchArgs::global_scale);
  def_pointer(dispatch, "topk_weights", &DispatchArgs::topk_weights);
  def_pointer(dispatch, "recv_x", &DispatchArgs::recv_x);
  def_pointer(dispatch, "recv_scales", &DispatchArgs::recv_scales);
  def_pointer(dispatch, "recv_scale_columns", &DispatchArgs::recv_scale_columns);
  def_pointer(dispatch, "recv_topk_idx", &DispatchArgs::recv_topk_idx);
  def_pointer(dispatch, "recv_topk_weights", &DispatchArgs::recv_topk_weights);
  def_pointer(dispatch, "stream", &DispatchArgs::stream);

  py::class_<CombineArgs> combine(m, "CombineArgs", py::module_local());
  combine.def(py::init<>())
      .def_readwrite("dtype", &CombineArgs::dtype)
      .def_readwrite("quant", &CombineArgs::quant)
      .def_readwrite("hidden", &CombineArgs::hidden)
      .def_readwrite("by_token", &CombineArgs::by_token)
      .def_readwrite("phase", &CombineArgs::phase)
      .def_readwrite("num_sms", &CombineArgs::num_sms);
  def_pointer(combine, "x", &CombineArgs::x);
  def_pointer(combine, "topk_weights", &CombineArgs::topk_weights);
  def_pointer(combine, "bias", &CombineArgs::bias);
  def_pointer(combine, "out", &CombineArgs::out);
  def_pointer(combine, "stream", &CombineArgs::stream);
}

// A Plan is handed out immutable. Attaching a receive block makes a new one.
void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan", py::module_local())
      .def_readonly("buffer_id", &Plan::buffer_id)
      .def_readonly("layout", &Plan::layout)
      .def_readonly("expert_alignment", &Plan::expert_alignment)
      .def_readonly("num_tokens", &Plan::num_tokens)
      .def_readonly("topk", &Plan::topk)
      .def_readonly("host_sync", &Plan::host_sync)
      .def_property_readonly("unsettled", [](const Plan& p) { return p.result.unsettled; })
      .def_property_readonly("num_recv_tokens",
                             [](const Plan& p) { return p.result.num_recv_tokens; })
      .def_property_readonly("num_recv_rows", [](const Plan& p) { return p.result.num_recv_rows; })
      .def_property_readonly("tokens_per_expert",
                             [](const Plan& p) { return p.result.tokens_per_expert; })
      .def("state", &Plan::state)
      .def("with_recv_block", [](const Plan& p, uintptr_t recv_meta) {
        return p.with_recv_block(reinterpret_cast<void*>(recv_meta));
      });
}

BufferOptions make_options(const py::kwargs& kwargs) {
  BufferOptions o;
  o.config.num_experts = kwargs["num_experts"].cast<int32_t>();
  o.config.hidden = kwargs["hidden"].cast<int32_t>();
  o.config.topk = kwargs["topk"].cast<int32_t>();
  o.config.max_tokens = kwargs["max_tokens"].cast<int32_t>();
  o.config.dtype = kwargs["dtype"].cast<Dtype>();
  o.expert_to_rank = kwargs["expert_to_rank"].cast<std::vector<int32_t>>();
  o.ranks_per_node = kwargs["ranks_per_node"].cast<int32_t>();
  o.transport = kwargs["transport"].cast<std::string>();
  o.timeout_s = kwargs["timeout"].cast<double>();
  o.window_bytes = kwargs["window_bytes"].cast<size_t>();
  o.transport_options = kwargs["transport_options"].cast<std::map<std::string, std::string>>();
  o.refuses_peer_memory = kwargs["refuses_peer_memory"].cast<std::string>();
  o.host = kwargs["host"].cast<std::string>();
  return o;
}

}  // namespace

void bind_buffer(py::module_& m) {
  py::register_local_exception_translator(&translate);
  bind_types(m);
  bind_args(m);
  bind_route_args(m);
  bind_plan(m);

  // The buffer protocol lets torch.frombuffer make tensors that own their piece of the window.
  py::class_<Allocation>(m, "Allocation", py::buffer_protocol(), py::module_local())
      .def_property_readonly(
          "address", [](const Allocation& a) { return reinterpret_cast<uintptr_t>(a.data); })
      .def_property_readonly("bytes", [](const Allocation& a) { return a.bytes; })
      .def_buffer([](Allocation& a) {
        return py::buffer_info(a.data, 1, py::format_descriptor<uint8_t>::format(),
                               static_cast<ssize_t>(a.bytes));
      });

  m.def("transports", &transport_names);
  m.def("refuse", [](py::object bootstrap, const std::string& why) {
    PyBootstrap wrapped(std::move(bootstrap));
    refuse(wrapped, why);
  });

  // Every rank's data, by rank, with the checks of what bootstrap returned.
  m.def("all_gather", [](py::object bootstrap, const py::bytes& data) {
    PyBootstrap wrapped(std::move(bootstrap));
    const std::string mine = data;
    std::string all(mine.size() * static_cast<size_t>(wrapped.size()), '\0');
    wrapped.all_gather(mine.data(), all.data(), mine.size());
    py::list pieces;
    for (size_t at = 0; at < all.size(); at += mine.size())
      pieces.append(py::bytes(all.data() + at, mine.size()));
    return pieces;
  });

  using gil = py::call_guard<py::gil_scoped_release>;
  py::class_<Buffer>(m, "Buffer", py::module_local())
      .def(py::init([](py::object bootstrap, const py::kwargs& kwargs) {
        auto shared = std::make_shared<PyBootstrap>(std::move(bootstrap));
        BufferOptions options = make_options(kwargs);
        py::gil_scoped_release release;
        return std::make_unique<Buffer>(std::move(shared), std::move(options));
      }))
      .def_property_readonly("rank", &Buffer::rank)
      .def_property_readonly("num_ranks", &Buffer::num_ranks)
      .def_property_readonly("id", &Buffer::id)
      .def_property_readonly("caps", &Buffer::caps)
      .def_property_readonly("transport", &Buffer::transport)
      .def_property_readonly("choice", &Buffer::choice)
      .def_property_readonly("local_experts", &Buffer::local_experts)
      .def_property_readonly("max_recv_tokens", &Buffer::max_recv_tokens)
      .def("check_usable", &Buffer::check_usable, gil())
      .def("check_faults", &Buffer::check_faults, gil())
      .def("max_recv_rows", &Buffer::max_recv_rows)
      .def("send_block", &Buffer::send_block)
      .def("recv_meta_bytes", &Buffer::recv_meta_bytes)
      .def("recv_block_bytes", &Buffer::recv_block_bytes)
      .def("allocate",
           [](Buffer& b, size_t bytes) -> std::optional<Allocation> {
             Allocation piece = b.allocate(bytes);
             if (piece.data == nullptr) return std::nullopt;
             return piece;
           })
      .def_property_readonly("free_bytes", &Buffer::free_bytes)
      .def(
          "route",
          [](Buffer& b, RouteArgs args, uintptr_t send_block) {
            args.plan =
                b.view_send_block(reinterpret_cast<void*>(send_block), args.num_tokens, args.topk);
            return b.route(args);
          },
          gil())
      .def("restore",
           [](const Buffer& b, const std::vector<int64_t>& state, uintptr_t send_block) {
             return b.restore(state, reinterpret_cast<void*>(send_block));
           })
      .def("dispatch", &Buffer::dispatch, gil())
      .def(
          "settle",
          [](Buffer& b, Plan plan) {
            const bool sent = b.settle(plan);
            return std::make_pair(std::move(plan), sent);
          },
          gil())
      .def("combine", &Buffer::combine, gil())
      .def("link_counters", &Buffer::link_counters)
      .def("reset_link_counters", &Buffer::reset_link_counters)
      .def("set_statistics",
           [](Buffer& b, uintptr_t received_tokens, uintptr_t max_wait_ns) {
             b.set_statistics({reinterpret_cast<int64_t*>(received_tokens),
                               reinterpret_cast<int64_t*>(max_wait_ns)});
           })
      .def("destroy", &Buffer::destroy, gil());
}

}  // namespace epcomm
