"""The Buffer: dispatch tokens to the ranks of their experts, combine the results."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from . import checks, env, native
from . import quant as quantisation
from .bootstrap import TIMEOUT_S, Bootstrap, bootstrap_of, set_up_seconds
from .checks import dtype_name
from .errors import Error, WindowFull
from .events import Event
from .results import (
    Combined,
    LinkCounters,
    LinkTraffic,
    OperationTraffic,
    Plan,
    Recv,
    Rows,
)
from .slots import rows_of_slots
from .streams import Call, CallOrder, ReceiveHalf
from .symmetric import tensors_of
from .tracing import profiled, untraced

_logger = logging.getLogger("epcomm")


class Buffer:
    """One rank's end of an expert-parallel group.

    Making a Buffer is collective, and so are dispatch and combine: all ranks call them in the same
    order. A Buffer is used by one thread at a time; a process may hold several, over the same or
    over different groups.

    Args:
        group: a `torch.distributed.ProcessGroup` of any backend (None = the default group), or an
            object with the methods of `epcomm.Bootstrap`. Used while the Buffer is made, not after.
        num_experts: experts in all. They need not divide by the number of ranks.
        hidden: elements of a token row; a row of `dtype` must be a multiple of 16 bytes.
        topk: most experts per token, 1 to 32.
        max_tokens: most tokens that any rank dispatches in one call.
        dtype: widest element type of token rows: bfloat16, float16 or float32.
        transport: "cpu", "hierarchical", "nccl" or "nvlink", or "auto" to choose by the machine,
            alike on all ranks (EPCOMM_TRANSPORT overrides "auto"). "hierarchical" works on tensors
            of the CPU. A GPU transport uses the device that is current when the Buffer is made.
        expert_to_rank: owner rank of each expert; None = a contiguous split of
            ceil(num_experts / num_ranks) experts a rank, the last ranks getting the shorter rest.
            Local ids follow ascending expert ids.
        ranks_per_node: ranks [0, n) form node 0, [n, 2n) node 1, ...; the last node may be smaller.
            Splits one machine into nodes (docs/hierarchical.md). None = all ranks are one node.
            "hierarchical" moves rows by it, "cpu" only counts by it, the others ignore it.
        timeout: seconds that a wait for a peer may take before `PeerLost` (default 30).
        window_bytes: memory for the tensors that calls return. None = from the sizes above. The cpu
            transport takes memory from the machine only where it is touched; nccl, and nvlink
            with small batches, return memory of torch's allocator and ignore this.
        transport_options: choices of one transport, by name; nccl: "algorithm", "schedule" and
            "chunks" (docs/nccl.md); hierarchical: "chunk_tokens" (docs/hierarchical.md); nvlink:
            "path" = "auto", "small" or "large" (docs/nvlink.md, "Small batches";
            `caps.small_batches` says which was taken).
        comm_stream: of asynchronous calls on a GPU; None = a stream of the Buffer's own.

    Attributes:
        name: names this Buffer among those of this process, for the custom ops of `epcomm.ops`.

    Raises:
        ConfigMismatch: ranks disagree on an argument or on epcomm's version; the same on all ranks.
        PeerLost: a rank did not take part within the timeout.
        ValueError: an argument is outside what is offered; the other ranks raise too.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | Bootstrap | None = None,
        *,
        num_experts: int,
        hidden: int,
        topk: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        transport: str = "auto",
        expert_to_rank: Sequence[int] | None = None,
        ranks_per_node: int | None = None,
        timeout: float | None = None,
        window_bytes: int | None = None,
        transport_options: Mapping[str, object] | None = None,
        comm_stream: torch.cuda.Stream | None = None,
    ) -> None:
        bootstrap = bootstrap_of(group, timeout)
        # Raises on all ranks or on none, so nobody needs to be told.
        transport = native.agree_on_transport(bootstrap, transport, set_up_seconds(timeout))
        try:
            self._module = native.module_of(transport)
            checks.choice("dtype", dtype, quantisation.ROW_DTYPES)
            if timeout is None:
                timeout = env.number("EPCOMM_TIMEOUT", TIMEOUT_S)
            if window_bytes is None:
                window_bytes = int(env.number("EPCOMM_WINDOW_BYTES", 0))
            if ranks_per_node is None:
                ranks_per_node = env.integer("EPCOMM_RANKS_PER_NODE")
            table = () if expert_to_rank is None else expert_to_rank
            options = {
                "num_experts": checks.integer("num_experts", num_experts),
                "hidden": checks.integer("hidden", hidden),
                "topk": checks.integer("topk", topk),
                "max_tokens": checks.integer("max_tokens", max_tokens),
                "dtype": self._dtype(dtype),
                "transport": transport,
                "expert_to_rank": checks.integers("expert_to_rank", table),
                "ranks_per_node": (
                    0
                    if ranks_per_node is None
                    else checks.integer("ranks_per_node", ranks_per_node, 1)
                ),
                "timeout": checks.seconds("timeout", timeout),
                "window_bytes": checks.integer("window_bytes", window_bytes, 0, 2**62),
                "transport_options": {str(k): str(v) for k, v in (transport_options or {}).items()},
            }
        except Exception as error:
            native.refuse(bootstrap, str(error))
            raise
        self._native = self._module.Buffer(bootstrap, **options)
        self.num_experts = num_experts
        self.hidden = hidden
        self.topk = topk
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.caps = self._native.caps
        on_gpu = self.caps.cuda
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else _CPU
        self._tensors = tensors_of(self._native, self._module, self._device)
        self.name = str(next(_numbers))
        _named[self.name] = self
        self._order = CallOrder(self._device, self._native.check_faults, comm_stream)
        self._half: ReceiveHalf | None = None  # of the last call, if it was made in halves
        if self.caps.small_batches:
            _logger.info(
                "transport %s: max_tokens = %d takes the path for small batches, one kernel a call",
                transport,
                max_tokens,
            )
        self._limits = checks.Limits(self._native.id, self._device, hidden, topk, max_tokens, dtype)

    @property
    def rank(self) -> int:
        """This rank in the group, 0 to num_ranks - 1."""
        return int(self._native.rank)

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return int(self._native.num_ranks)

    @property
    def local_experts(self) -> int:
        """Experts that this rank owns."""
        return int(self._native.local_experts)

    @property
    def max_recv_tokens(self) -> int:
        """Most tokens that this rank can receive in one call: num_ranks * max_tokens."""
        return int(self._native.max_recv_tokens)

    @property
    def transport(self) -> str:
        """Name of the transport that moves the bytes."""
        return str(self._native.transport)

    def check_faults(self) -> None:
        """Raises what became known of earlier calls since they returned: `PeerLost` or `Evicted`.

        Calls check this themselves. For callers that have waited for a GPU call by other means than
        its event, and want to know whether its results are whole.
        """
        self._native.check_faults()

    def link_counters(self, *, reset: bool = False) -> LinkCounters:
        """Rows and bytes that this rank has sent, by operation and kind of link. Local.

        Counted since the Buffer was made or the counters were last reset. Nodes are those of
        `ranks_per_node`. Not counted: signals, and the counts and addresses (a few hundred bytes a
        peer) that ranks announce when they enter a call. Offered by "cpu" and "hierarchical".

        Args:
            reset: start again from 0 after this.

        Raises:
            ValueError: the transport does not count (`buf.caps.link_counters` is False).
            BufferUnusable: the Buffer was destroyed.
        """
        native = self._native.link_counters()
        if reset:
            self._native.reset_link_counters()

        def traffic(operation: Any) -> OperationTraffic:
            links = (operation.local, operation.node, operation.rail)
            return OperationTraffic(*(LinkTraffic(i.rows, i.bytes, i.meta_bytes) for i in links))

        return LinkCounters(traffic(native.dispatch), traffic(native.combine))

    def destroy(self) -> None:
        """Gives back windows and connections. Local; may be called twice.

        Tensors that were returned stay valid. Later calls raise `BufferUnusable`; peers that still
        wait for this rank raise `PeerLost`.
        """
        self._half = None
        self._tensors.close()
        self._native.destroy()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    @untraced
    def dispatch(
        self,
        x: Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        plan: Plan | None = None,
        layout: str = "token",
        expert_alignment: int = 1,
        quant: str | None = None,
        quant_scale: torch.Tensor | float | None = None,
        scale_layout: str = "row",
        host_sync: bool = True,
        async_op: bool = False,
        return_recv_hook: bool = False,
        previous_event: Event | torch.cuda.Event | None = None,
        num_sms: int | None = None,
    ) -> Recv:
        """Sends each token to the ranks that own its experts, once per rank. Collective.

        Args:
            x: [num_tokens, hidden] of bfloat16, float16 or float32 (not wider than the Buffer's
                dtype), or a pair (q, scales): q float8_e4m3fn [num_tokens, hidden] or uint8
                [num_tokens, a multiple of 16]; scales [num_tokens, any] of float32, int32, uint8 or
                float8_e4m3fn. num_tokens may differ between ranks and may be 0.
            topk_idx: [num_tokens, k] int64 or int32 expert ids, k at most topk and equal on all
                ranks; -1 = none. An expert that a token names twice gets the token once.
            topk_weights: [num_tokens, k] float32, delivered beside the rows; None (on all ranks) =
                none are delivered.
            plan: replays the routing of an earlier dispatch instead of topk_idx; the layout is the
                plan's.
            layout: "token", "expert" or "padded"; see `Recv`.
            expert_alignment: group starts of layout "expert" are multiples of this many rows.
            quant: None, "fp8" (e4m3, fp32 scale per 128 channels), "fp8_ue8m0" (power-of-two
                scales, four to an int32) or "nvfp4" (e2m1, e4m3 scale per 16, a global scale):
                quantises x on the way, with the bits of `epcomm.quant.quantize`; received as a
                pair. hidden must be a multiple of 128 ("nvfp4": 32).
            quant_scale: for "nvfp4", this rank's global scale: a number or float32 tensor of one
                element; None = from this rank's x. Delivered per row as `recv.global_scale`.
            scale_layout: of received scales: "row", or "column": [rows, n] with stride 1 over rows
                and columns that start on 16 bytes, as DeepGEMM reads them; not in layout "padded".
            host_sync: False: never waits for counts on the host; worst-case shapes, counts in
                tensors.
            async_op: returns at once; `recv.event` marks completion. Complete already on the CPU.
            return_recv_hook: splits send from receive: nothing received may be read before
                `recv.hook()` was called, nor does `recv.event` mark completion before. Where
                `caps.two_phases` is set, no SM is held between; the next call on this Buffer issues
                the receive half if the hook was not called. Excludes async_op.
            previous_event: the work starts after this event.
            num_sms: most SMs used on a GPU; no effect on the CPU.

        Raises:
            ValueError, TypeError: a bad argument; nothing was sent, and the call may be repeated.
            ConfigMismatch: ranks disagree on the call (dtype, layout, ...); the same on all ranks.
            WindowFull: no room for the result on some rank; raised on all ranks.
            PeerLost, Evicted, BufferUnusable: see `epcomm.errors`.
        """
        self._native.check_usable()
        self._limits.quantisation(x, quant, quant_scale)
        if (topk_idx is None) == (plan is None):
            raise ValueError(
                "topk_idx and plan are both "
                + ("missing" if plan is None else "given")
                + "; expected exactly one of them"
            )
        if plan is not None:
            self._limits.plan(plan)
        checks.call_arguments(async_op, return_recv_hook, previous_event, num_sms)
        rows, scales = self._limits.rows(x)
        num_tokens = rows.shape[0]
        if plan is None:
            assert topk_idx is not None
            self._limits.routing(topk_idx, num_tokens, layout, expert_alignment)
            topk = topk_idx.shape[1]
        else:
            if num_tokens != plan.num_tokens:
                raise ValueError(
                    f"x has {num_tokens} tokens; expected the plan's num_tokens = {plan.num_tokens}"
                )
            topk, layout = plan.topk, plan.layout
        self._limits.scale_layout(scale_layout, quant is not None or scales is not None, layout)
        if topk_weights is not None:
            self._limits.tensor("topk_weights", topk_weights, (torch.float32,), (num_tokens, topk))

        self._finish_half()
        call = self._order.begin(
            async_op or return_recv_hook,
            previous_event,
            (rows, scales, topk_idx, topk_weights, _tensor_or_none(quant_scale)),
        )
        args = self._module.DispatchArgs()
        moved = [(part.dtype, part.shape[1]) for part in (rows, scales) if part is not None]
        if quant is not None:
            moved = quantisation.FORMATS[quant].moved(self.hidden)
        args.dtype = self._dtype(moved[0][0])
        args.row_bytes, args.scale_bytes = [w * d.itemsize for d, w in (*moved, _NOTHING)][:2]
        args.topk_weights = _address(topk_weights)
        args.num_sms = num_sms or 0
        args.stream = call.stream
        # Scales that are rearranged must be there: such a call is not made in halves.
        rearranged = scale_layout == "column" or (
            quant is not None and quantisation.FORMATS[quant].global_scale
        )
        self._begin_half(args, return_recv_hook and not rearranged)
        try:
            with call.allocating(), profiled("dispatch", rows, scales):
                if plan is None:
                    assert topk_idx is not None
                    plan = self._route(topk_idx, layout, expert_alignment, host_sync, args)
                sent = self._set_rows(args, rows, scales, quant, quant_scale)
                recv = self._send(plan, moved, args)
                del sent  # args pointed to it until here
                recv = self._scales(recv, quant, scale_layout)
        except (Error, ValueError):
            raise  # the same on all ranks that are in this call
        except BaseException:
            # This rank alone has failed half-way (no memory for a tensor, an interrupt): its peers
            # are in a call that it will not finish, and learn of it by this.
            self.destroy()
            raise
        received = recv.x if isinstance(recv.x, tuple) else (recv.x,)
        block = (recv.plan.send_block, recv.plan.recv_block)
        outputs = (recv.topk_idx, recv.topk_weights, recv.global_scale)
        made = (*received, *outputs, *block)
        event = call.end(made)
        native_plan = recv.plan.native
        hook = None
        if return_recv_hook:
            hook = self._hook(
                call, event, args, made, lambda: self._native.dispatch(native_plan, args)
            )
        return dataclasses.replace(recv, event=event, hook=hook)

    @untraced
    def combine(
        self,
        x: torch.Tensor,
        plan: Plan,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        quant: str | None = None,
        async_op: bool = False,
        return_recv_hook: bool = False,
        previous_event: Event | torch.cuda.Event | None = None,
        num_sms: int | None = None,
    ) -> torch.Tensor | Combined:
        """Returns results to the tokens' ranks and sums them. Collective.

        y[t] = round(sum over ranks r, ascending, of partial[r, t], then + bias[t]), in fp32,
        rounded once; the same bits every run. partial[r, t] is rounded to the dtype of x and is
            without topk_weights: the sum of the distinct rows of rank r that carry token t;
            with topk_weights: the sum over k, ascending, of topk_weights[t, k] * (the row that
            carries (t, k)). In layout "token" that is the one row of (t, r).
        A token that was sent nowhere gives 0 (+ bias).
        The transport "hierarchical" adds up each node first: y[t] = round(sum over nodes,
        ascending, of node[t], then + bias[t]), where node[t] = round(sum over ranks r of the node,
        ascending, of partial[r, t]).

        Args:
            x: rows in the shape of `recv.x`, bfloat16, float16 or float32 (not wider than the
                Buffer's dtype).
            plan: of the dispatch that delivered the rows, on this Buffer.
            topk_weights: [num_tokens, topk] float32 on the tokens' own rank; given on all ranks or
                on none.
            bias: [num_tokens, hidden] in the dtype of x, added to the sum.
            out: [num_tokens, hidden] in the dtype of x, written and returned.
            quant: "fp8": every partial, in fp32 and not rounded to the dtype of x, crosses as e4m3
                with an fp32 scale per 128 channels, and q * scale is what is summed: fewer bytes,
                less precision (docs/quantisation.md). hidden must be a multiple of 128. On the
                transports whose `caps.combine_quants` has it: cpu.
            async_op, return_recv_hook, previous_event, num_sms: as in `dispatch`.

        Returns:
            [num_tokens, hidden] in the dtype of x; with async_op or return_recv_hook a `Combined`.

        Raises:
            As `dispatch`.
        """
        self._native.check_usable()
        self._limits.plan(plan)
        checks.call_arguments(async_op, return_recv_hook, previous_event, num_sms)
        checks.choice(
            f"quant of combine over the {self.transport} transport",
            quant,
            (None, *(kind.name for kind in self.caps.combine_quants)),
        )
        limits = self._limits
        limits.tensor("x", x, limits.row_dtypes(), self._shape(plan, self.hidden))
        limits.row_memory("x", x)
        shape = (plan.num_tokens, self.hidden)
        if topk_weights is not None:
            limits.tensor(
                "topk_weights", topk_weights, (torch.float32,), (plan.num_tokens, plan.topk)
            )
        if bias is not None:
            limits.tensor("bias", bias, (x.dtype,), shape)
            limits.row_memory("bias", bias)
        if out is not None:
            limits.tensor("out", out, (x.dtype,), shape)
            limits.row_memory("out", out)

        block = (plan.send_block, plan.recv_block)
        self._finish_half()
        call = self._order.begin(
            async_op or return_recv_hook, previous_event, (x, topk_weights, bias, out, *block)
        )
        made = None
        if out is None:
            with call.allocating():
                out = made = torch.empty(shape, dtype=x.dtype, device=self._device)
        args = self._combine_args(x, out, num_sms, call)
        args.topk_weights = _address(topk_weights)
        args.bias = _address(bias)
        if quant is not None:
            args.quant = getattr(self._module.Quant, quant)
        self._begin_half(args, return_recv_hook)
        with profiled("combine", out):
            self._native.combine(plan.native, args)
        event = call.end((made,))
        if return_recv_hook:
            keep = (x, topk_weights, bias, out, *block)
            hook = self._hook(
                call, event, args, keep, lambda: self._native.combine(plan.native, args)
            )
            return Combined(out, event, hook)
        if async_op:
            return Combined(out, event, None)
        return out

    @untraced
    def combine_input(self, plan: Plan, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor for the experts' outputs, to pass to `combine`. Not collective.

        Shape of `recv.x` of the plan, dtype of the Buffer unless given. On nvlink the owners of the
        tokens load the rows of layout "token" from it directly; from any other memory they are
        copied once more. On the other transports it is as good as any tensor.

        Raises:
            WindowFull: no room for it; on this rank only.
            ValueError: the plan is not of this Buffer, or dtype is not a row type.
        """
        self._native.check_usable()
        self._limits.plan(plan)
        dtype = self.dtype if dtype is None else dtype
        checks.choice("dtype", dtype, self._limits.row_dtypes())
        wanted = [(dtype, self._shape(plan, self.hidden))]
        made = self._tensors.make(wanted)
        if made is None:
            needed = math.prod(wanted[0][1]) * dtype.itemsize
            raise WindowFull(
                f"the window of rank {self.rank} is full: combine_input needs {needed} bytes, "
                f"{self._native.free_bytes} are free; drop tensors of earlier calls or make the "
                "Buffer with a larger window_bytes",
                self.rank,
                needed,
                self._native.free_bytes,
            )
        return made[0]

    @untraced
    def combine_topk_weights(
        self,
        values: torch.Tensor,
        plan: Plan,
        *,
        every_slot: bool = False,
        async_op: bool = False,
        previous_event: Event | torch.cuda.Event | None = None,
        num_sms: int | None = None,
    ) -> torch.Tensor | Combined:
        """Returns one float per slot to the tokens' ranks: gradients of topk_weights. Collective.

        The adjoint of how `dispatch` delivers topk_weights: y[t, k] is the value at the place where
        (t, k)'s weight arrived. Slots of one expert that share a row all get that row's value.

        Args:
            values: float32 in the shape of `recv.topk_weights` of the plan's layout. What belongs
                to no slot (experts of other ranks, padding) is not looked at, NaN included.
            plan: of the dispatch that delivered the rows, on this Buffer. It need not have
                delivered weights.
            every_slot: layout "token" only: y[t, k] is the sum over all rows of token t, on any
                rank, of their value k, also where the expert of (t, k) is on another rank.
            async_op, previous_event, num_sms: as in `dispatch`.

        Returns:
            [num_tokens, topk] float32, 0 where topk_idx is -1; with async_op a `Combined`.

        Raises:
            As `dispatch`.
        """
        self._native.check_usable()
        self._limits.plan(plan)
        checks.call_arguments(async_op, False, previous_event, num_sms)
        if every_slot and plan.layout != "token":
            raise ValueError(f"every_slot is True with layout {plan.layout!r}; expected 'token'")
        self._limits.tensor("values", values, (torch.float32,), self._slot_shape(plan))
        block = (plan.send_block, plan.recv_block)
        self._finish_half()
        call = self._order.begin(async_op, previous_event, (values, *block))
        with call.allocating():
            record_bytes = self._native.recv_meta_bytes(plan.topk, 1)
            rows = rows_of_slots(values, plan, record_bytes, every_slot)
            y = rows.new_empty((plan.num_tokens, rows.shape[1]))
            args = self._combine_args(rows, y, num_sms, call)
            args.by_token = True
            with profiled("combine_topk_weights", y):
                self._native.combine(plan.native, args)
            y = y[:, : plan.topk].contiguous()
        event = call.end((y,))
        return Combined(y, event, None) if async_op else y

    # Calls in halves.

    def _begin_half(self, args: Any, in_halves: bool) -> None:
        if in_halves and self.caps.two_phases:
            args.phase = self._module.Phase.send

    def _hook(
        self,
        call: Call,
        event: Event,
        args: Any,
        keep: Sequence[torch.Tensor | None],
        launch: Callable[[], None],
    ) -> Callable[[], None]:
        """What completes a call with return_recv_hook: its receive half where there is one."""
        if args.phase != self._module.Phase.send:
            return event.wait
        args.phase = self._module.Phase.receive
        self._half = ReceiveHalf(call, event, launch, keep)
        return self._half

    def _finish_half(self) -> None:
        """Nothing else may run between the halves of a call."""
        half, self._half = self._half, None
        if half is not None:
            half.finish()

    # Steps of dispatch.

    def _route(
        self,
        topk_idx: torch.Tensor,
        layout: str,
        alignment: int,
        host_sync: bool,
        dispatch: Any,
    ) -> Plan:
        num_tokens, topk = topk_idx.shape
        block_bytes = self._native.send_block(num_tokens, topk).bytes
        send_block = torch.empty(block_bytes, dtype=torch.uint8, device=self._device)
        args = self._module.RouteArgs()
        args.topk_idx = topk_idx.data_ptr()
        args.index_type = self._index_type(topk_idx.dtype)
        args.num_tokens = num_tokens
        args.topk = topk
        args.layout = getattr(self._module.Layout, layout)
        args.expert_alignment = alignment
        args.dtype = dispatch.dtype
        args.row_bytes = dispatch.row_bytes
        args.scale_bytes = dispatch.scale_bytes
        args.weighted = dispatch.topk_weights != 0
        args.host_sync = host_sync
        args.stream = dispatch.stream
        native_plan = self._native.route(args, send_block.data_ptr())
        return self._plan(native_plan, send_block, None, topk_idx.dtype)

    def _plan(
        self,
        native_plan: Any,
        send_block: torch.Tensor,
        recv_block: torch.Tensor | None,
        index_dtype: torch.dtype,
    ) -> Plan:
        sizes = self._native.send_block(native_plan.num_tokens, native_plan.topk)

        def int32_array(offset: int, count: int) -> torch.Tensor:
            return send_block[offset : offset + 4 * count].view(torch.int32)

        host_sync = native_plan.host_sync
        return Plan(
            layout=native_plan.layout.name,
            expert_alignment=native_plan.expert_alignment,
            num_tokens=native_plan.num_tokens,
            topk=native_plan.topk,
            num_recv_tokens=native_plan.num_recv_tokens if host_sync else None,
            num_recv_rows=native_plan.num_recv_rows
            if host_sync
            else self._native.max_recv_rows(
                native_plan.layout, native_plan.topk, native_plan.expert_alignment
            ),
            tokens_per_expert=int32_array(sizes.tokens_per_expert, self.local_experts),
            expert_offsets=int32_array(sizes.expert_offset, self.local_experts + 1),
            num_recv=int32_array(sizes.num_recv, 1),
            index_dtype=index_dtype,
            recv_capacity=native_plan.num_recv_tokens if host_sync else self.max_recv_tokens,
            native=native_plan,
            send_block=send_block,
            recv_block=recv_block,
            send_offsets=sizes,
            count_shapes=((self.num_ranks, self.num_ranks), (self.num_ranks, self.num_experts)),
        )

    def restored_plan(
        self, state: list[int], send_block: torch.Tensor, recv_block: torch.Tensor | None
    ) -> Plan:
        """The plan whose `native.state()` and blocks, or copies of them, these are.

        Without recv_block, a plan to dispatch with.
        """
        native_plan = self._native.restore(state, send_block.data_ptr())
        if recv_block is not None:
            native_plan = native_plan.with_recv_block(recv_block.data_ptr())
        plan = self._plan(native_plan, send_block, recv_block, torch.int32)
        send_bytes = self._native.send_block(plan.num_tokens, plan.topk).bytes
        self._limits.tensor("send_block", send_block, (torch.uint8,), (send_bytes,))
        if recv_block is not None:
            recv_bytes = self._native.recv_block_bytes(plan.native, plan.recv_capacity)
            self._limits.tensor("recv_block", recv_block, (torch.uint8,), (recv_bytes,))
        return plan

    def _send(self, plan: Plan, moved: Sequence[tuple[torch.dtype, int]], args: Any) -> Recv:
        args.index_type = self._index_type(plan.index_dtype)
        args.replay = plan.recv_block is not None
        args.recv_capacity = plan.recv_capacity
        args.row_capacity = plan.num_recv_rows
        shapes = [(dtype, self._shape(plan, width)) for dtype, width in moved]
        wanted = dict(zip(("x", "scales"), shapes, strict=False))
        if plan.recv_block is None:
            meta_bytes = self._native.recv_block_bytes(plan.native, plan.recv_capacity)
            wanted["meta"] = (torch.uint8, (meta_bytes,))
        by_token = plan.layout == "token"
        entries = (plan.recv_capacity, plan.topk) if by_token else self._shape(plan, 0)[:-1]
        slots = {}
        if plan.layout != "padded":
            slots["topk_idx"] = (plan.index_dtype, entries)
        if args.topk_weights != 0:
            slots["topk_weights"] = (torch.float32, entries)
        peers_write_slots = by_token and self.caps.cuda and self.caps.symmetric_outputs
        if peers_write_slots:
            wanted |= slots
        made = self._tensors.make(list(wanted.values()))
        if made is None:
            # The others must learn of it: the call goes on just far enough to raise on all ranks.
            args.needed_bytes = sum(math.prod(s) * d.itemsize for d, s in wanted.values())
            args.free_bytes = self._native.free_bytes
            self._native.dispatch(plan.native, args)
            raise AssertionError("dispatch with a full window must raise")
        received = dict(zip(wanted, made, strict=True))
        if not peers_write_slots:
            for name, (dtype, shape) in slots.items():
                received[name] = torch.empty(shape, dtype=dtype, device=self._device)
        if plan.recv_block is None:
            meta = received["meta"]
            attached = plan.native.with_recv_block(meta.data_ptr())
            plan = dataclasses.replace(plan, native=attached, recv_block=meta)
        for name in ("x", "scales", "topk_idx", "topk_weights"):
            if name in received:
                setattr(args, f"recv_{name}", received[name].data_ptr())
        self._native.dispatch(plan.native, args)
        x = received["x"]
        return Recv(
            x=(x, received["scales"]) if len(moved) > 1 else x,
            topk_idx=received.get("topk_idx"),
            topk_weights=received.get("topk_weights"),
            tokens_per_expert=plan.tokens_per_expert,
            num_tokens=plan.num_recv,
            plan=plan,
            event=Event(),
        )

    def _combine_args(
        self, x: torch.Tensor, out: torch.Tensor, num_sms: int | None, call: Call
    ) -> Any:
        args = self._module.CombineArgs()
        args.x = x.data_ptr()
        args.out = out.data_ptr()
        args.dtype = self._dtype(x.dtype)
        args.hidden = x.shape[-1]
        args.num_sms = num_sms or 0
        args.stream = call.stream
        return args

    def _set_rows(
        self,
        args: Any,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        quant: str | None,
        quant_scale: torch.Tensor | float | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Fills in what is sent; where the transport does not quantise on the way, quantised here.

        Returns the tensors that args points to, to be kept until they are sent.
        """
        if quant is not None:
            made = None
            if quantisation.FORMATS[quant].global_scale:
                made = quantisation.make_global_scale(rows, quant_scale)
            kind = getattr(self._module.Quant, quant)
            if kind in self.caps.fused_quants:
                args.x = rows.data_ptr()
                args.x_dtype = self._dtype(rows.dtype)
                args.quant = kind
                args.global_scale = _address(made)
                return (made,)
            rows, scales = quantisation.quantize_to_move(rows, quant, made, args.num_sms)
        args.x = rows.data_ptr()
        args.scales = _address(scales)
        return rows, scales

    def _scales(self, recv: Recv, quant: str | None, scale_layout: str) -> Recv:
        """Received scales as the caller wants them."""
        if not isinstance(recv.x, tuple):
            return recv
        (q, scales), global_scale = recv.x, None
        if quant is not None and quantisation.FORMATS[quant].global_scale:
            scales, global_scale = quantisation.split_moved(scales, self.hidden)
        if scale_layout == "column":
            scales = quantisation.column_major(scales)
        return dataclasses.replace(recv, x=(q, scales), global_scale=global_scale)

    def _dtype(self, dtype: torch.dtype) -> Any:
        return getattr(self._module.Dtype, dtype_name(dtype))

    def _index_type(self, dtype: torch.dtype) -> Any:
        return getattr(self._module.IndexType, dtype_name(dtype))

    def _shape(self, plan: Plan, width: int) -> tuple[int, ...]:
        """Shape of the plan's receive tensor with rows of `width` elements."""
        if plan.layout == "padded":
            return (self.local_experts, self.num_ranks * self.max_tokens, width)
        return (plan.num_recv_rows, width)

    def _slot_shape(self, plan: Plan) -> tuple[int, ...]:
        """Shape of the plan's topk_weights at the receiver."""
        if plan.layout == "token":
            return (plan.recv_capacity, plan.topk)
        return self._shape(plan, 0)[:-1]


def named(name: str) -> Buffer:
    """The Buffer of this process whose `name` it is. ValueError if it is gone."""
    buffer = _named.get(name)
    if buffer is None:
        raise ValueError(
            f"buffer is {name!r}, but there is no Buffer of that name in this process; keep the "
            "Buffer as long as its plans and gradients are used"
        )
    return buffer


def _tensor_or_none(value: Any) -> torch.Tensor | None:
    return value if isinstance(value, torch.Tensor) else None


def _address(tensor: torch.Tensor | None) -> int:
    """Address of a tensor, 0 for none. An empty tensor has none, but must still count as given."""
    if tensor is None:
        return 0
    return tensor.data_ptr() or _PLACEHOLDER.data_ptr()


_NOTHING = (torch.uint8, 0)
_numbers = itertools.count()
_named: weakref.WeakValueDictionary[str, Buffer] = weakref.WeakValueDictionary()
_CPU = torch.device("cpu")
_PLACEHOLDER = torch.empty(16, dtype=torch.uint8)
