"""The Buffer: dispatch tokens to the ranks of their experts, combine the results."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from . import _core, checks, env
from .bootstrap import Bootstrap, TorchBootstrap
from .events import Event
from .quant import quantize_fp8
from .results import Combined, Plan, Recv, Rows

_logger = logging.getLogger("epcomm")

_INT32_MAX = 2**31 - 1
_ROW_DTYPES = {
    torch.bfloat16: _core.Dtype.bfloat16,
    torch.float16: _core.Dtype.float16,
    torch.float32: _core.Dtype.float32,
}
_QUANTISED_DTYPES = {
    torch.float8_e4m3fn: _core.Dtype.float8_e4m3fn,
    torch.uint8: _core.Dtype.uint8,
}
_SCALE_DTYPES = (torch.float32, torch.int32, torch.uint8, torch.float8_e4m3fn)
_INDEX_DTYPES = {torch.int64: _core.IndexType.int64, torch.int32: _core.IndexType.int32}
_LAYOUTS = {
    "token": _core.Layout.token,
    "expert": _core.Layout.expert,
    "padded": _core.Layout.padded,
}
_QUANTS = (None, "fp8", "fp8_ue8m0")


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
        transport: "cpu", or "auto" to choose by the machine (EPCOMM_TRANSPORT overrides "auto").
        expert_to_rank: owner rank of each expert; None = a contiguous split of
            ceil(num_experts / num_ranks) experts a rank, the last ranks getting the shorter rest.
            Local ids follow ascending expert ids.
        timeout: seconds that a wait for a peer may take before `PeerLost` (default 30).
        window_bytes: memory for the tensors that calls return. None = from the sizes above. The cpu
            transport takes memory from the machine only where it is touched.

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
        timeout: float | None = None,
        window_bytes: int | None = None,
    ) -> None:
        checks.choice("dtype", dtype, tuple(_ROW_DTYPES))
        if timeout is None:
            timeout = env.number("EPCOMM_TIMEOUT") or 30.0
        if window_bytes is None:
            window_bytes = int(env.number("EPCOMM_WINDOW_BYTES") or 0)
        if group is None or isinstance(group, dist.ProcessGroup):
            bootstrap: Bootstrap = TorchBootstrap(group, timeout)
        else:
            bootstrap = group
        if transport == "auto":
            transport = env.text("EPCOMM_TRANSPORT") or "cpu"
            _logger.info("transport auto: %s", transport)
        self._native = _core.Buffer(
            bootstrap,
            num_experts=checks.integer("num_experts", num_experts, -_INT32_MAX, _INT32_MAX),
            hidden=checks.integer("hidden", hidden, -_INT32_MAX, _INT32_MAX),
            topk=checks.integer("topk", topk, -_INT32_MAX, _INT32_MAX),
            max_tokens=checks.integer("max_tokens", max_tokens, -_INT32_MAX, _INT32_MAX),
            dtype=_ROW_DTYPES[dtype],
            transport=transport,
            expert_to_rank=[] if expert_to_rank is None else [int(r) for r in expert_to_rank],
            timeout=float(timeout),
            window_bytes=checks.integer("window_bytes", window_bytes, 0, 2**62),
        )
        self.num_experts = num_experts
        self.hidden = hidden
        self.topk = topk
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.caps = self._native.caps
        self._device = torch.device("cpu")

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
    def transport(self) -> str:
        """Name of the transport that moves the bytes."""
        return str(self._native.transport)

    def destroy(self) -> None:
        """Gives back windows and connections. Local; may be called twice.

        Tensors that were returned stay valid. Later calls raise `BufferUnusable`; peers that still
        wait for this rank raise `PeerLost`.
        """
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
        host_sync: bool = True,
        async_op: bool = False,
        return_recv_hook: bool = False,
        previous_event: Event | None = None,
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
            quant: None, "fp8" (e4m3, fp32 scale per 128 channels) or "fp8_ue8m0" (power-of-two
                scales): quantises x on the way; received as a pair.
            host_sync: False: never waits for counts on the host; worst-case shapes, counts in
                tensors.
            async_op: returns at once; `recv.event` marks completion. Complete already on the CPU.
            return_recv_hook: splits send from receive: nothing received may be read before
                `recv.hook()` was called. Excludes async_op.
            previous_event: the work starts after this event.
            num_sms: most SMs used on a GPU; no effect on the CPU.

        Raises:
            ValueError, TypeError: a bad argument; nothing was sent, and the call may be repeated.
            ConfigMismatch: ranks disagree on the call (dtype, layout, ...); the same on all ranks.
            WindowFull: no room for the result on some rank; raised on all ranks.
            PeerLost, Evicted, BufferUnusable: see `epcomm.errors`.
        """
        self._native.check_usable()
        checks.choice("quant", quant, _QUANTS)
        if (topk_idx is None) == (plan is None):
            raise ValueError(
                "topk_idx and plan are both "
                + ("missing" if plan is None else "given")
                + "; expected exactly one of them"
            )
        if plan is not None:
            self._check_plan(plan)
        self._check_async(async_op, return_recv_hook, num_sms)
        if quant is not None:
            x = self._quantise(x, quant)
        rows, scales = self._check_rows(x)
        num_tokens = rows.shape[0]
        if plan is None:
            assert topk_idx is not None
            checks.choice("layout", layout, tuple(_LAYOUTS))
            checks.integer("expert_alignment", expert_alignment, 1, 2**20)
            self._tensor("topk_idx", topk_idx, tuple(_INDEX_DTYPES), (num_tokens, "topk"))
            checks.integer("topk_idx.shape[1]", topk_idx.shape[1], 1, self.topk)
            topk = topk_idx.shape[1]
        else:
            if num_tokens != plan.num_tokens:
                raise ValueError(
                    f"x has {num_tokens} tokens; expected the plan's num_tokens = {plan.num_tokens}"
                )
            topk = plan.topk
        if topk_weights is not None:
            self._tensor("topk_weights", topk_weights, (torch.float32,), (num_tokens, topk))

        if previous_event is not None:
            previous_event.synchronize()
        if plan is None:
            assert topk_idx is not None
            plan = self._route(topk_idx, layout, expert_alignment, host_sync)
        recv = self._send(plan, rows, scales, topk_weights)
        if return_recv_hook:
            return dataclasses.replace(recv, hook=_nothing_left)
        return recv

    def combine(
        self,
        x: torch.Tensor,
        plan: Plan,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        async_op: bool = False,
        return_recv_hook: bool = False,
        previous_event: Event | None = None,
        num_sms: int | None = None,
    ) -> torch.Tensor | Combined:
        """Returns results to the tokens' ranks and sums them. Collective.

        y[t] = round(sum over ranks r, ascending, of partial[r, t], then + bias[t]), in fp32,
        rounded once; the same bits every run. partial[r, t] is rounded to the dtype of x and is
            without topk_weights: the sum of the distinct rows of rank r that carry token t;
            with topk_weights: the sum over k, ascending, of topk_weights[t, k] * (the row that
            carries (t, k)). In layout "token" that is the one row of (t, r).
        A token that was sent nowhere gives 0 (+ bias).

        Args:
            x: rows in the shape of `recv.x`, bfloat16, float16 or float32 (not wider than the
                Buffer's dtype).
            plan: of the dispatch that delivered the rows, on this Buffer.
            topk_weights: [num_tokens, topk] float32 on the tokens' own rank; given on all ranks or
                on none.
            bias: [num_tokens, hidden] in the dtype of x, added to the sum.
            out: [num_tokens, hidden] in the dtype of x, written and returned.
            async_op, return_recv_hook, previous_event, num_sms: as in `dispatch`.

        Returns:
            [num_tokens, hidden] in the dtype of x; with async_op or return_recv_hook a `Combined`.

        Raises:
            As `dispatch`.
        """
        self._native.check_usable()
        self._check_plan(plan)
        self._check_async(async_op, return_recv_hook, num_sms)
        self._tensor("x", x, self._row_dtypes(), self._shape(plan, self.hidden))
        self._check_row_bytes("x", x.shape[-1] * x.element_size())
        shape = (plan.num_tokens, self.hidden)
        if topk_weights is not None:
            self._tensor(
                "topk_weights", topk_weights, (torch.float32,), (plan.num_tokens, plan.topk)
            )
        if bias is not None:
            self._tensor("bias", bias, (x.dtype,), shape)
        if out is None:
            out = torch.empty(shape, dtype=x.dtype, device=self._device)
        else:
            self._tensor("out", out, (x.dtype,), shape)

        if previous_event is not None:
            previous_event.synchronize()
        args = _core.CombineArgs()
        args.x = x.data_ptr()
        args.out = out.data_ptr()
        args.dtype = _ROW_DTYPES[x.dtype]
        args.hidden = self.hidden
        args.num_sms = num_sms or 0
        args.topk_weights = _address(topk_weights)
        args.bias = _address(bias)
        self._native.combine(plan.native, args)
        if async_op or return_recv_hook:
            return Combined(out, Event(), _nothing_left if return_recv_hook else None)
        return out

    # Steps of dispatch.

    def _route(self, topk_idx: torch.Tensor, layout: str, alignment: int, host_sync: bool) -> Plan:
        num_tokens, topk = topk_idx.shape
        sizes = self._native.send_block(num_tokens, topk)
        send_block = torch.empty(sizes.bytes, dtype=torch.uint8, device=self._device)
        args = _core.RouteArgs()
        args.topk_idx = topk_idx.data_ptr()
        args.index_type = _INDEX_DTYPES[topk_idx.dtype]
        args.num_tokens = num_tokens
        args.topk = topk
        args.layout = _LAYOUTS[layout]
        args.expert_alignment = alignment
        args.host_sync = host_sync
        native = self._native.route(args, send_block.data_ptr())

        def int32_array(offset: int, count: int) -> torch.Tensor:
            return send_block[offset : offset + 4 * count].view(torch.int32)

        capacity = native.num_recv_tokens if host_sync else self._native.max_recv_tokens
        rows = (
            native.num_recv_rows
            if host_sync
            else self._native.max_recv_rows(args.layout, topk, alignment)
        )
        return Plan(
            layout=layout,
            expert_alignment=alignment,
            num_tokens=num_tokens,
            topk=topk,
            num_recv_tokens=native.num_recv_tokens if host_sync else None,
            num_recv_rows=rows,
            tokens_per_expert=int32_array(sizes.tokens_per_expert, self.local_experts),
            expert_offsets=int32_array(sizes.expert_offset, self.local_experts + 1),
            num_recv=int32_array(sizes.num_recv, 1),
            index_dtype=topk_idx.dtype,
            recv_capacity=capacity,
            native=native,
            send_block=send_block,
            recv_block=None,
        )

    def _send(
        self,
        plan: Plan,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
    ) -> Recv:
        args = _core.DispatchArgs()
        args.x = rows.data_ptr()
        args.dtype = {**_ROW_DTYPES, **_QUANTISED_DTYPES}[rows.dtype]
        args.row_bytes = rows.shape[1] * rows.element_size()
        args.index_type = _INDEX_DTYPES[plan.index_dtype]
        args.recv_capacity = plan.recv_capacity
        args.row_capacity = plan.num_recv_rows
        args.topk_weights = _address(topk_weights)
        wanted = [(rows.dtype, self._shape(plan, rows.shape[1]))]
        if scales is not None:
            args.scales = _address(scales)
            args.scale_bytes = scales.shape[1] * scales.element_size()
            wanted.append((scales.dtype, self._shape(plan, scales.shape[1])))
        if plan.recv_block is None:
            meta_bytes = self._native.recv_meta_bytes(plan.topk, plan.recv_capacity)
            wanted.append((torch.uint8, (meta_bytes,)))
        received = self._window_tensors(wanted)
        if received is None:
            # The others must learn of it: the call goes on just far enough to raise on all ranks.
            args.needed_bytes = sum(math.prod(s) * d.itemsize for d, s in wanted)
            args.free_bytes = self._native.free_bytes
            self._native.dispatch(plan.native, args)
            raise AssertionError("dispatch with a full window must raise")
        if plan.recv_block is None:
            meta = received.pop()
            # The address even where nothing is received: an empty tensor would hide it.
            native = plan.native.with_recv_block(_address(meta))
            plan = dataclasses.replace(plan, native=native, recv_block=meta)
        args.recv_x = received[0].data_ptr()
        if scales is not None:
            args.recv_scales = received[1].data_ptr()

        by_token = plan.layout == "token"
        entries = (plan.recv_capacity, plan.topk) if by_token else self._shape(plan, 0)[:-1]
        recv_idx = recv_weights = None
        if plan.layout != "padded":
            recv_idx = torch.empty(entries, dtype=plan.index_dtype, device=self._device)
            args.recv_topk_idx = recv_idx.data_ptr()
        if topk_weights is not None:
            recv_weights = torch.empty(entries, dtype=torch.float32, device=self._device)
            args.recv_topk_weights = recv_weights.data_ptr()
        self._native.dispatch(plan.native, args)
        return Recv(
            x=received[0] if scales is None else (received[0], received[1]),
            topk_idx=recv_idx,
            topk_weights=recv_weights,
            tokens_per_expert=plan.tokens_per_expert,
            num_tokens=plan.num_recv,
            plan=plan,
            event=Event(),
        )

    def _window_tensors(
        self, wanted: Sequence[tuple[torch.dtype, tuple[int, ...]]]
    ) -> list[torch.Tensor] | None:
        """Tensors in memory that peers can write; None if there is no room for all of them."""
        tensors = []
        for dtype, shape in wanted:
            piece = self._native.allocate(math.prod(shape) * dtype.itemsize)
            if piece is None:
                return None
            if math.prod(shape) == 0:
                tensors.append(torch.empty(shape, dtype=dtype, device=self._device))
            else:
                # The tensor's storage holds the piece, which returns to the window with it.
                tensors.append(torch.frombuffer(piece, dtype=dtype).view(shape))
        return tensors

    # Checks.

    def _tensor(
        self,
        name: str,
        value: Any,
        dtypes: Sequence[torch.dtype],
        shape: Sequence[int | str],
    ) -> None:
        checks.tensor(name, value, device=self._device, dtypes=dtypes, shape=shape)

    def _row_dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(d for d in _ROW_DTYPES if d.itemsize <= self.dtype.itemsize)

    def _check_rows(self, x: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Checks x, and splits a pair into rows and scales."""
        if not isinstance(x, (tuple, list)):
            self._tensor("x", x, self._row_dtypes(), ("num_tokens", self.hidden))
            rows, scales = x, None
        elif len(x) != 2:
            raise ValueError(
                f"x is a sequence of {len(x)}; expected a tensor or a pair (q, scales)"
            )
        else:
            rows, scales = x
            packed = isinstance(rows, torch.Tensor) and rows.dtype == torch.uint8
            width = "row_bytes" if packed else self.hidden
            self._tensor("x[0]", rows, tuple(_QUANTISED_DTYPES), ("num_tokens", width))
            self._tensor("x[1]", scales, _SCALE_DTYPES, (rows.shape[0], "num_scales"))
            checks.integer("x[1].shape[1]", scales.shape[1], 1, _INT32_MAX)
        self._check_row_bytes(
            "x" if scales is None else "x[0]", rows.shape[1] * rows.element_size()
        )
        if rows.shape[0] > self.max_tokens:
            raise ValueError(
                f"x has {rows.shape[0]} tokens; expected at most max_tokens = {self.max_tokens}; "
                "make the Buffer with a larger max_tokens or dispatch in smaller batches"
            )
        return rows, scales

    def _check_row_bytes(self, name: str, row_bytes: int) -> None:
        widest = self.hidden * self.dtype.itemsize
        if row_bytes == 0 or row_bytes % 16 != 0 or row_bytes > widest:
            raise ValueError(
                f"{name} has rows of {row_bytes} bytes; expected a multiple of 16, at most the "
                f"{widest} bytes of a row of {self.dtype}; pad hidden"
            )

    def _check_plan(self, plan: Any) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(
                f"plan is a {type(plan).__name__}; expected the epcomm.Plan of a dispatch"
            )
        if plan.native.buffer_id != self._native.id:
            raise ValueError(
                f"plan was made by another Buffer (id {plan.native.buffer_id}); expected a plan of "
                f"this Buffer (id {self._native.id})"
            )

    def _check_async(self, async_op: bool, return_recv_hook: bool, num_sms: int | None) -> None:
        if async_op and return_recv_hook:
            raise ValueError("async_op and return_recv_hook are both True; expected at most one")
        if num_sms is not None:
            checks.integer("num_sms", num_sms, 1, 1024)

    def _quantise(self, x: Rows, kind: str) -> Rows:
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"quant is {kind!r} but x is a pair already; expected one tensor")
        self._tensor("x", x, self._row_dtypes(), ("num_tokens", self.hidden))
        return quantize_fp8(x, ue8m0=kind == "fp8_ue8m0")

    def _shape(self, plan: Plan, width: int) -> tuple[int, ...]:
        """Shape of the plan's receive tensor with rows of `width` elements."""
        if plan.layout == "padded":
            return (self.local_experts, self.num_ranks * self.max_tokens, width)
        return (plan.num_recv_rows, width)


def _address(tensor: torch.Tensor | None) -> int:
    """Address of a tensor, 0 for none. An empty tensor has none, but must still count as given."""
    if tensor is None:
        return 0
    return tensor.data_ptr() or _PLACEHOLDER.data_ptr()


_PLACEHOLDER = torch.empty(16, dtype=torch.uint8)


def _nothing_left() -> None:
    """The receive half of a call that was complete when it returned."""
