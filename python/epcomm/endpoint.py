"""A Buffer's inside: what its calls share, and how it is made."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import checks, env, native
from .agreement import Choice, agree_on_transport
from .bootstrap import TIMEOUT_S, Bootstrap, bootstrap_of, set_up_seconds
from .events import Event
from .quant import ROW_DTYPES
from .results import ArrayShapes, Plan
from .statistics import Counters
from .streams import Call, CallOrder
from .symmetric import tensors_of

_logger = logging.getLogger("epcomm")


class Arguments(NamedTuple):
    """What a Buffer is made from; the arguments of these names of `Buffer`, as they were given."""

    num_experts: int
    hidden: int
    topk: int
    max_tokens: int
    dtype: torch.dtype
    transport: str
    expert_to_rank: Sequence[int] | None
    ranks_per_node: int | None
    timeout: float | None
    window_bytes: int | None
    transport_options: Mapping[str, object] | None
    statistics: bool | None


def connect(
    group: dist.ProcessGroup | Bootstrap | None,
    arguments: Arguments,
    comm_stream: torch.cuda.Stream | None,
) -> Endpoint:
    """Collective. Checks the arguments, agrees with the other ranks and makes this rank's end."""
    timeout = arguments.timeout
    bootstrap = bootstrap_of(group, timeout)
    # Raises on all ranks or on none, so nobody needs to be told.
    sizes = arguments.num_experts, arguments.max_tokens
    choice = agree_on_transport(bootstrap, arguments.transport, set_up_seconds(timeout), sizes)
    try:
        module = native.module_of(choice.transport)
        options = _native_options(module, choice, arguments)
        if arguments.statistics is None:
            arguments = arguments._replace(statistics=env.switch("EPCOMM_STATISTICS"))
    except Exception as error:
        native.refuse(bootstrap, str(error))
        raise
    return Endpoint(module.Buffer(bootstrap, **options), module, arguments, comm_stream)


def _native_options(module: ModuleType, choice: Choice, arguments: Arguments) -> dict[str, Any]:
    """The checked arguments of the native Buffer; the environment's where the caller gave none."""
    checks.choice("dtype", arguments.dtype, ROW_DTYPES)
    timeout = arguments.timeout
    if timeout is None:
        timeout = env.number("EPCOMM_TIMEOUT", TIMEOUT_S)
    window_bytes = arguments.window_bytes
    if window_bytes is None:
        window_bytes = int(env.number("EPCOMM_WINDOW_BYTES", 0))
    ranks_per_node = arguments.ranks_per_node
    if ranks_per_node is None:
        ranks_per_node = env.integer("EPCOMM_RANKS_PER_NODE")
    if ranks_per_node is None:
        ranks_per_node = choice.ranks_per_node
    table = () if arguments.expert_to_rank is None else arguments.expert_to_rank
    return {
        "num_experts": checks.integer("num_experts", arguments.num_experts),
        "hidden": checks.integer("hidden", arguments.hidden),
        "topk": checks.integer("topk", arguments.topk),
        "max_tokens": checks.integer("max_tokens", arguments.max_tokens),
        "dtype": _by_dtype(module.Dtype)[arguments.dtype],
        "transport": choice.transport,
        "expert_to_rank": checks.integers("expert_to_rank", table),
        "ranks_per_node": (
            0 if ranks_per_node is None else checks.integer("ranks_per_node", ranks_per_node, 1)
        ),
        "timeout": checks.seconds("timeout", timeout),
        "window_bytes": checks.integer("window_bytes", window_bytes, 0, 2**62),
        "transport_options": {
            str(k): str(v) for k, v in (arguments.transport_options or {}).items()
        },
        "refuses_peer_memory": env.nccl_refusal(),
        "host": env.text("NCCL_HOSTID") or "",
    }


class Endpoint:
    """One rank's end of a group: the native Buffer and what the calls need around it.

    Attributes:
        native: the Buffer of the extension module `module`, which moves the bytes.
        caps: what its transport can do.
        num_experts, hidden, dtype, max_tokens, num_ranks, local_experts, max_recv_tokens: as of
            `Buffer`.
        device: of the tensors.
        native_dtypes, index_types, layouts: what the extension module calls torch's dtypes, and
            layouts.
        fused_quants: names of the quantisations that the transport does on the way.
        send_block: as of the native Buffer; max_recv_rows, too, of a layout's name.
        array_shapes: of the arrays in send blocks.
        limits: checks what callers pass.
        tensors: makes the tensors that calls return.
        received: tokens and rows that the last dispatch with host_sync received, by layout, topk
            and expert_alignment.
        order: makes the calls, in order with the caller's streams.
        counters: what `Buffer.statistics` reads; None = nothing is counted.
    """

    def __init__(
        self,
        native_buffer: Any,
        module: ModuleType,
        arguments: Arguments,
        comm_stream: torch.cuda.Stream | None,
    ) -> None:
        num_experts, hidden, topk, max_tokens, dtype, *_ = arguments
        self.native = native_buffer
        self.module = module
        self.caps = native_buffer.caps
        self.num_experts = num_experts
        self.hidden = hidden
        self.dtype = dtype
        self.num_ranks = int(native_buffer.num_ranks)
        self.local_experts = int(native_buffer.local_experts)
        self.max_tokens = max_tokens
        self.max_recv_tokens = int(native_buffer.max_recv_tokens)
        on_gpu = self.caps.cuda
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else _CPU
        self.native_dtypes = _by_dtype(module.Dtype)
        self.index_types = _by_dtype(module.IndexType)
        self.layouts = dict(module.Layout.__members__)
        self.fused_quants = frozenset(kind.name for kind in self.caps.fused_quants)
        # Asked for in every call.
        self.send_block = functools.lru_cache(maxsize=1024)(native_buffer.send_block)
        layouts = self.layouts
        self.max_recv_rows = functools.lru_cache(maxsize=1024)(
            lambda layout, *routing: native_buffer.max_recv_rows(layouts[layout], *routing)
        )
        ranks, local_experts = self.num_ranks, self.local_experts
        self.array_shapes = ArrayShapes(
            (ranks, ranks), (ranks, num_experts), (local_experts,), (local_experts + 1,)
        )
        self.limits = checks.Limits(native_buffer.id, self.device, hidden, topk, max_tokens, dtype)
        self.tensors = tensors_of(native_buffer, module, self.device)
        self.received: dict[tuple[str, int, int], tuple[int, int]] = {}
        self.order = CallOrder(self.device, native_buffer.check_faults, comm_stream)
        self.counters = Counters(native_buffer, self.device) if arguments.statistics else None
        if native_buffer.choice:
            _logger.info("transport %s: %s", native_buffer.transport, native_buffer.choice)
        if self.caps.small_batches:
            _logger.info(
                "transport %s: max_tokens = %d takes the path for small batches, one kernel a call",
                native_buffer.transport,
                max_tokens,
            )

    def destroy(self) -> None:
        """As `Buffer.destroy`."""
        self.order.close()
        self.tensors.close()
        self.native.destroy()

    def row_shape(self, plan: Plan, width: int) -> tuple[int, ...]:
        """Shape of the plan's receive tensor with rows of `width` elements."""
        if plan.layout == "padded":
            return (self.local_experts, self.num_ranks * self.max_tokens, width)
        return (plan.num_recv_rows, width)

    def slot_shape(self, plan: Plan) -> tuple[int, ...]:
        """Shape of the plan's topk_weights at the receiver."""
        if plan.layout == "token":
            return (plan.recv_capacity, plan.topk)
        return self.row_shape(plan, 0)[:-1]

    def send_half_only(self, args: Any) -> None:
        """Where the transport has halves, the call that args describe issues its send half only."""
        if self.caps.two_phases:
            args.phase = self.module.Phase.send

    def hook(
        self,
        call: Call,
        event: Event,
        args: Any,
        launch: Callable[[], None],
        keep: Iterable[torch.Tensor | None],
    ) -> Callable[[], None]:
        """What completes a call with return_recv_hook: its receive half where there is one."""
        if args.phase != self.module.Phase.send:
            return event.wait
        args.phase = self.module.Phase.receive
        return self.order.defer_half(call, event, launch, keep)


def address(tensor: torch.Tensor | None) -> int:
    """Address of a tensor, 0 for none. An empty tensor has none, but must still count as given."""
    if tensor is None:
        return 0
    return tensor.data_ptr() or _PLACEHOLDER.data_ptr()


def _by_dtype(native_types: Any) -> dict[torch.dtype, Any]:
    """The members of an enum of the extension module, whose names are those of torch's dtypes."""
    return {getattr(torch, name): member for name, member in native_types.__members__.items()}


_CPU = torch.device("cpu")
_PLACEHOLDER = torch.empty(16, dtype=torch.uint8)
