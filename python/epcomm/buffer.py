"""The Buffer: dispatch tokens to the ranks of their experts, combine the results."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from .bootstrap import Bootstrap
from .combine import Sum, combine_rows, combine_slots, make_input
from .dispatch import Payload, dispatch_rows
from .endpoint import Arguments, connect
from .events import Event
from .plans import Routing, restore
from .results import (
    Combined,
    LinkCounters,
    LinkTraffic,
    OperationTraffic,
    Plan,
    Recv,
    Rows,
    Statistics,
)
from .streams import CallOptions
from .tracing import untraced


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
        transport: "cpu", "hierarchical", "nccl", "nvlink" or "rdma", or "auto" to choose by the
            machine, alike on all ranks (EPCOMM_TRANSPORT overrides "auto"). "hierarchical" works on
            tensors of the GPU where torch sees one, else of the CPU. A GPU transport uses the
            device that is current when the Buffer is made. The first Buffer with "rdma", or
            "hierarchical" on GPUs, must be over all ranks that will share one (docs/rdma.md).
        expert_to_rank: owner rank of each expert; None = a contiguous split of
            ceil(num_experts / num_ranks) experts a rank, the last ranks getting the shorter rest.
            Local ids follow ascending expert ids.
        ranks_per_node: ranks [0, n) form node 0, [n, 2n) node 1, ...; the last node may be smaller.
            Splits one machine into nodes (docs/hierarchical.md). None = all ranks are one node, or,
            of "hierarchical" between GPUs of several machines, those of each machine.
            "hierarchical" moves rows by it, "cpu" only counts by it, the others ignore it.
        timeout: seconds that a wait for a peer may take before `PeerLost` (default 30).
        window_bytes: memory for the tensors that calls return. None = from the sizes above. The cpu
            transport takes memory from the machine only where it is touched; nccl, and nvlink
            with small batches, return memory of torch's allocator and ignore this; rdma, too, but
            takes this much symmetric memory when it needs more than it has.
        transport_options: choices of one transport, by name; nccl: "algorithm", "schedule",
            "chunks" and "ctas" (docs/nccl.md); hierarchical: "chunk_tokens" (docs/hierarchical.md);
            nvlink: "path" = "auto", "small" or "large" (docs/nvlink.md, "Small batches";
            `caps.small_batches` says which was taken, also of nccl: docs/nccl.md, "Through the
            peers' windows").
        statistics: count received tokens and the longest waits, for `statistics()`. Ranks may
            differ. None = as EPCOMM_STATISTICS says, else False.
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
        statistics: bool | None = None,
        comm_stream: torch.cuda.Stream | None = None,
    ) -> None:
        arguments = Arguments(
            num_experts=num_experts,
            hidden=hidden,
            topk=topk,
            max_tokens=max_tokens,
            dtype=dtype,
            transport=transport,
            expert_to_rank=expert_to_rank,
            ranks_per_node=ranks_per_node,
            timeout=timeout,
            window_bytes=window_bytes,
            transport_options=transport_options,
            statistics=statistics,
        )
        self._end = connect(group, arguments, comm_stream)
        self._native = self._end.native
        self.num_experts = num_experts
        self.hidden = hidden
        self.topk = topk
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.caps = self._end.caps
        self.name = str(next(_numbers))
        _named[self.name] = self

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
        peer) that ranks announce when they enter a call. Offered by "cpu", and by "hierarchical"
        between processes.

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

    def statistics(self, *, reset: bool = False) -> Statistics:
        """What this rank has received and waited for, of a Buffer with statistics=True. Local.

        Counted since the Buffer was made or the counters were last reset, by calls that the current
        stream has waited for; replays of a CUDA graph count. Does not wait for a GPU: reading a
        number does. Also after `destroy()`.

        Args:
            reset: start again from 0 after this. Calls on other streams count before or after.

        Raises:
            ValueError: the Buffer was made without statistics.
        """
        if self._end.counters is None:
            raise ValueError("statistics is False; make the Buffer with statistics=True")
        return self._end.counters.read(reset)

    def destroy(self) -> None:
        """Gives back windows and connections. Local; may be called twice.

        Tensors that were returned stay valid. Later calls raise `BufferUnusable`; peers that still
        wait for this rank raise `PeerLost`.
        """
        self._end.destroy()

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
                and columns that start on 16 bytes, as DeepGEMM reads them; in layout "padded" each
                expert's part of [L, rows, n].
            host_sync: False: never waits for counts on the host; worst-case shapes, counts in
                tensors. True: exact shapes; views of tensors that may be larger.
            async_op: returns at once; `recv.event` marks completion. Complete already on the CPU.
            return_recv_hook: splits send from receive: nothing received may be read before
                `recv.hook()` was called, nor does `recv.event` mark completion before. Where
                `caps.two_phases` is set, no SM is held between; the next call on this Buffer issues
                the receive half if the hook was not called. Excludes async_op. With host_sync=True
                alike on all ranks.
            previous_event: the work starts after this event.
            num_sms: most SMs used on a GPU; no effect on the CPU.

        Raises:
            ValueError, TypeError: a bad argument; nothing was sent, and the call may be repeated.
            ConfigMismatch: ranks disagree on the call (dtype, layout, ...); the same on all ranks.
            WindowFull: no room for the result on some rank; raised on all ranks.
            PeerLost, Evicted, BufferUnusable: see `epcomm.errors`.
        """
        return dispatch_rows(
            self._end,
            Payload(x, topk_weights, quant, quant_scale, scale_layout),
            Routing(topk_idx, plan, layout, expert_alignment, host_sync),
            CallOptions(async_op, return_recv_hook, previous_event, num_sms),
        )

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
                transports whose `caps.combine_quants` has it: cpu; nvlink, rdma, and nccl through
                the peers' windows, with small batches.
            async_op, return_recv_hook, previous_event, num_sms: as in `dispatch`.

        Returns:
            [num_tokens, hidden] in the dtype of x; with async_op or return_recv_hook a `Combined`.

        Raises:
            As `dispatch`.
        """
        return combine_rows(
            self._end,
            Sum(x, topk_weights, bias, out, quant),
            plan,
            CallOptions(async_op, return_recv_hook, previous_event, num_sms),
        )

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
        return make_input(self._end, plan, dtype)

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
        options = CallOptions(async_op, False, previous_event, num_sms)
        return combine_slots(self._end, values, plan, every_slot, options)

    def restored_plan(
        self, state: list[int], send_block: torch.Tensor, recv_block: torch.Tensor | None
    ) -> Plan:
        """The plan whose `native.state()` and blocks, or copies of them, these are.

        Without recv_block, a plan to dispatch with.
        """
        return restore(self._end, state, send_block, recv_block)


def named(name: str) -> Buffer:
    """The Buffer of this process whose `name` it is. ValueError if it is gone."""
    buffer = _named.get(name)
    if buffer is None:
        raise ValueError(
            f"buffer is {name!r}, but there is no Buffer of that name in this process; keep the "
            "Buffer as long as its plans and gradients are used"
        )
    return buffer


_numbers = itertools.count()
_named: weakref.WeakValueDictionary[str, Buffer] = weakref.WeakValueDictionary()
