"""The normal calls of deep_ep's V1 `Buffer`: layout "token" of epcomm."""

from __future__ import annotations

from typing import Any

import torch

from ...buffer import Buffer as EpcommBuffer
from ...checks import integer
from ...events import Event
from ...results import Combined, Recv, Rows
from .config import Config
from .handles import Handle, Routing, normal_handle, routing_of
from .layout import check_layout, dispatch_layout, pseudo_topk_idx
from .pool import KNOCK, Pool, Shape
from .utils.event import EventOverlap, capture, epcomm_event, result_event

Bias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Dispatched = tuple[
    Rows,
    torch.Tensor | None,
    torch.Tensor | None,
    list[int] | None,
    Handle | None,
    EventOverlap,
]
MAX_TOPK = 32  # of epcomm


def check_streams(previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool) -> None:
    """deep_ep's rule for allocate_on_comm_stream. What it asks for is what epcomm always does."""
    given = previous_event is not None and getattr(previous_event, "event", None) is not None
    if allocate_on_comm_stream and not (given and async_finish):
        raise ValueError(
            "allocate_on_comm_stream is True with previous_event "
            f"{'given' if given else 'None'} and async_finish {async_finish}; expected an event "
            "and True"
        )


def contiguous_rows(x: Rows) -> Rows:
    """x as epcomm takes it; deep_ep takes scales of any strides."""
    if isinstance(x, (tuple, list)):
        if len(x) != 2:
            raise ValueError(
                f"x is a sequence of {len(x)}; expected a tensor or a pair (q, scales)"
            )
        return x[0], x[1].contiguous()
    return x


def first_rows(x: Rows | None, num_rows: int) -> Any:
    """The first rows of a tensor or of both tensors of a pair; None of None."""
    if isinstance(x, tuple):
        return first_rows(x[0], num_rows), first_rows(x[1], num_rows)
    return x if x is None or x.shape[0] == num_rows else x[:num_rows]


def rounded_up(counts: list[int], alignment: int) -> list[int]:
    """Counts rounded up to multiples of the alignment."""
    return counts if alignment == 1 else [-(-n // alignment) * alignment for n in counts]


def one_bias(bias: Bias | None) -> torch.Tensor | None:
    """Both tensors of a pair are added in fp32 and rounded to one: a rounding deep_ep lacks."""
    if isinstance(bias, (tuple, list)):
        if len(bias) != 2:
            raise ValueError(f"bias is a sequence of {len(bias)}; expected a tensor or a pair")
        return (bias[0].float() + bias[1].float()).to(bias[0].dtype)
    return bias


def combined(y: torch.Tensor | Combined) -> tuple[torch.Tensor, Event | None]:
    """The tensor and, of an asynchronous call, the event of epcomm's combine."""
    return (y.y, y.event) if isinstance(y, Combined) else (y, None)


class NormalCalls:
    """Mixed into `Buffer`. R = group_size, L = num_experts / R."""

    num_sms: int = 20
    group_size: int
    _pool: Pool

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Counts of a routing. Local; on the current stream.

        Returns:
            (num_tokens_per_rank int32 [R], num_tokens_per_rdma_rank int32 [R / 8] or None for
            R <= 8, num_tokens_per_expert int32 [num_experts], is_token_in_rank bool [T, R], event).
            A token that names an expert twice counts once.
        """
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
        event = epcomm_event(previous_event)
        if event is not None:
            event.wait()
        counts = dispatch_layout(topk_idx, num_experts, self.group_size)
        return (*counts, capture() if async_finish else EventOverlap())

    def dispatch(
        self,
        x: Rows,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Dispatched:
        """Sends tokens to the ranks of their experts, a row per (token, rank). Collective.

        Args:
            x: bf16 [T, H], or a pair (float8_e4m3fn [T, H], scales [T, S] fp32 or int32).
            handle: of an earlier dispatch, to send other rows the same way; no topk_* then.
            num_tokens_per_expert: int32 [num_experts]; gives the number of experts and, without
                topk_idx, their counts.
            is_token_in_rank: bool [T, R]; the routing where there is no topk_idx.
            topk_idx, topk_weights: int64 and fp32 [T, K], both or none; -1 = no expert.
            expert_alignment: counts of the returned list are rounded up to it; rows are not padded.
            num_worst_tokens: rows to make room for, so that the host does not wait for counts.
            config: its num_sms, else Buffer.num_sms, caps the SMs. The rest has no effect.

        Returns:
            (recv_x like x with N rows, by source rank, then token; recv_topk_idx int64 [N, K],
            local ids or -1; recv_topk_weights fp32 [N, K]; counts per local expert; handle; event).
            With handle: (recv_x, None, None, None, None, event).
        """
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
        x = contiguous_rows(x)
        how: dict[str, Any] = {
            "async_op": async_finish,
            "previous_event": epcomm_event(previous_event),
            "num_sms": self._num_sms(config),
        }
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("handle is given with topk_idx or topk_weights; expected neither")
            routing = routing_of(handle)
            recv = routing.buffer.dispatch(x, plan=routing.plan, **how)
            event = result_event(recv.event if async_finish else None)
            return first_rows(recv.x, routing.recv_rows), None, None, None, None, event

        if (topk_idx is None) != (topk_weights is None):
            raise ValueError("topk_idx and topk_weights must be given together")
        if num_tokens_per_expert is None:
            raise ValueError(
                "num_tokens_per_expert is None; expected what get_dispatch_layout says"
            )
        integer("expert_alignment", expert_alignment, 1)
        integer("num_worst_tokens", num_worst_tokens, 0)
        num_experts = num_tokens_per_expert.numel()
        if num_experts % self.group_size != 0:
            raise ValueError(
                f"num_tokens_per_expert has {num_experts} experts; expected a multiple of the "
                f"{self.group_size} ranks"
            )
        if topk_idx is None:
            return self._dispatch_to_ranks(
                x, is_token_in_rank, num_tokens_per_expert, expert_alignment, num_worst_tokens, how
            )
        check_layout(topk_idx, is_token_in_rank, num_tokens_per_expert)
        recv, buffer = self._send(x, topk_idx, topk_weights, num_experts, num_worst_tokens, how)
        counts: list[int] = []
        if not num_worst_tokens:
            counts = list(recv.plan.native.tokens_per_expert)
        recv_rows = num_worst_tokens or recv.plan.num_recv_rows
        return (
            first_rows(recv.x, recv_rows),
            first_rows(recv.topk_idx, recv_rows),
            first_rows(recv.topk_weights, recv_rows),
            rounded_up(counts, expert_alignment),
            normal_handle(Routing(buffer, recv.plan, num_experts, recv_rows)),
            result_event(recv.event if async_finish else None),
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: torch.Tensor | None = None,
        bias: Bias | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Sums rows over ranks in fp32, unweighted, on the rank of their token. Collective.

        Args:
            x: bf16 [N, H], rows as dispatch returned them.
            topk_weights: fp32 [N, K], summed per slot over ranks (on all ranks or none).
            bias: bf16 [T, H], or a pair, which is added up and rounded to bf16 first.
            config: as in dispatch.

        Returns:
            (bf16 [T, H], fp32 [T, K] or None, event).
        """
        check_streams(previous_event, async_finish, allocate_on_comm_stream)
        routing = routing_of(handle)
        buffer, plan = routing.buffer, routing.plan
        how: dict[str, Any] = {
            "async_op": async_finish,
            "previous_event": epcomm_event(previous_event),
            "num_sms": self._num_sms(config),
        }
        y, event = combined(buffer.combine(all_rows(x, routing), plan, bias=one_bias(bias), **how))
        if topk_weights is None:
            return y, None, result_event(event)
        # The later of two calls on one stream: its event marks both.
        weights = all_rows(topk_weights, routing)
        y_weights, event = combined(
            buffer.combine_topk_weights(weights, plan, every_slot=True, **how)
        )
        return y, y_weights, result_event(event)

    def internode_dispatch(
        self,
        x: Rows,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Dispatched:
        """As `dispatch`, which takes any number of nodes."""
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            0,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: torch.Tensor | None = None,
        bias: Bias | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """As `combine`, which takes any number of nodes."""
        return self.combine(
            x,
            handle,
            topk_weights,
            bias,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    # Steps.

    def _num_sms(self, config: Config | None) -> int:
        return max(1, self.num_sms if config is None else config.num_sms)

    def _send(
        self,
        x: Rows,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        num_experts: int,
        num_worst_tokens: int,
        how: dict[str, Any],
    ) -> tuple[Recv, EpcommBuffer]:
        """Dispatches on the Buffer for this shape, which grows if it must."""
        rows = x[0] if isinstance(x, tuple) else x
        num_tokens, hidden = rows.shape
        integer("topk_idx.shape[1]", topk_idx.shape[1], 1, MAX_TOPK)
        dtype = rows.dtype if rows.dtype in (torch.float16, torch.float32) else torch.bfloat16
        shape = Shape(
            rows.device,
            num_experts,
            hidden,
            topk_idx.shape[1],
            dtype,
            num_worst_tokens=num_worst_tokens,
        )

        def dispatch(buffer: EpcommBuffer) -> tuple[Recv, EpcommBuffer]:
            wait = not num_worst_tokens
            return buffer.dispatch(x, topk_idx, topk_weights, host_sync=wait, **how), buffer

        def knock(buffer: EpcommBuffer) -> None:
            none: Any = first_rows(topk_weights, 0)
            buffer.dispatch(first_rows(x, 0), topk_idx[:0], none, expert_alignment=KNOCK)

        if not num_worst_tokens:
            return self._pool.call(shape, num_tokens, dispatch, knock)
        buffer = self._pool.get(shape, num_tokens)
        if num_tokens > buffer.max_tokens:
            raise ValueError(
                f"x has {num_tokens} tokens; with num_worst_tokens = {num_worst_tokens} expected "
                f"at most {buffer.max_tokens}: raise num_worst_tokens to {self.group_size} ranks "
                "times the tokens of the largest batch"
            )
        return dispatch(buffer)

    def _dispatch_to_ranks(
        self,
        x: Rows,
        is_token_in_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor,
        expert_alignment: int,
        num_worst_tokens: int,
        how: dict[str, Any],
    ) -> Dispatched:
        """dispatch without topk_idx: one pseudo expert per rank."""
        size = self.group_size
        if is_token_in_rank is None:
            raise ValueError("topk_idx and is_token_in_rank are both None; expected one of them")
        if num_worst_tokens:
            raise ValueError("num_worst_tokens is given without topk_idx; expected both or neither")
        if size > MAX_TOPK:
            raise NotImplementedError(
                f"dispatch without topk_idx is offered for up to {MAX_TOPK} ranks; this group has "
                f"{size}: pass topk_idx and topk_weights"
            )
        recv, buffer = self._send(x, pseudo_topk_idx(is_token_in_rank), None, size, 0, how)
        counts = _exchange_counts(buffer, num_tokens_per_expert.view(size, -1))
        return (
            recv.x,
            None,
            None,
            rounded_up(counts, expert_alignment),
            normal_handle(
                Routing(buffer, recv.plan, num_tokens_per_expert.numel(), recv.plan.num_recv_rows)
            ),
            result_event(recv.event if how["async_op"] else None),
        )


def _exchange_counts(buffer: EpcommBuffer, counts: torch.Tensor) -> list[int]:
    """Sum over ranks of their counts [R, L]: each row goes to its rank, as the scales of a row."""
    size = counts.shape[0]
    rows = torch.zeros(size, 16, dtype=torch.uint8, device=counts.device)
    to_all = torch.full((size, size), -1, dtype=torch.int64, device=counts.device)
    to_all[:, 0] = torch.arange(size, device=counts.device)
    recv = buffer.dispatch((rows, counts.int().contiguous()), to_all)
    return [int(n) for n in recv.x[1].sum(0).tolist()]


def all_rows(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """x with the rows that num_worst_tokens cut off."""
    missing = routing.plan.num_recv_rows - routing.recv_rows
    if missing == 0 or x.shape[0] != routing.recv_rows:
        return x
    return torch.cat([x, x.new_empty(missing, x.shape[1])])
