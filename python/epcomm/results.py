"""What dispatch and combine return."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from .events import Event

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Token rows: one tensor, or a pair (quantised rows, scales)."""


class ArrayShapes(NamedTuple):
    """Shapes of the arrays in a plan's send block, alike for all plans of a Buffer."""

    rank_count: tuple[int, int]
    expert_count: tuple[int, int]
    experts: tuple[int]
    offsets: tuple[int]


@dataclass(frozen=True)
class Plan:
    """The immutable routing of one batch: who sends which token to which row.

    Made by `Buffer.dispatch`. Pass it to `Buffer.combine`, or to `Buffer.dispatch(plan=...)` to
    send other rows the same way. Usable any number of times, by the Buffer that made it, as long
    as that lives. R = num_ranks, E = num_experts, L = local_experts.

    The tensors below are the plan's own memory: read them, never write them.

    Attributes:
        layout: "token", "expert" or "padded".
        expert_alignment: rows that group starts of the expert layout are multiples of.
        num_tokens: tokens of this rank that were dispatched.
        topk: experts per token.
        num_recv_tokens: distinct tokens received here; None with host_sync=False.
        num_recv_rows: rows of the receive tensor in this layout (worst case with host_sync=False).
        rank_count: int32 [R, R], tokens that each source rank (row) sends to each rank (column).
        expert_count: int32 [R, E], tokens that each source rank sends to each expert.
        tokens_per_expert: int32 [L], distinct tokens per local expert.
        expert_offsets: int32 [L + 1], first row of each local expert's group; the last entry is the
            number of rows. Layouts "expert" and "padded".
    """

    layout: str
    expert_alignment: int
    num_tokens: int
    topk: int
    num_recv_tokens: int | None
    num_recv_rows: int
    index_dtype: torch.dtype = field(repr=False)
    recv_capacity: int = field(repr=False)
    native: Any = field(repr=False)
    send_block: torch.Tensor = field(repr=False)
    recv_block: torch.Tensor | None = field(repr=False)
    send_offsets: Any = field(repr=False)
    array_shapes: ArrayShapes = field(repr=False)

    # Made when they are asked for: every call would pay for the views.
    @functools.cached_property
    def tokens_per_expert(self) -> torch.Tensor:
        return self._int32_array(self.send_offsets.tokens_per_expert, self.array_shapes.experts)

    @functools.cached_property
    def expert_offsets(self) -> torch.Tensor:
        return self._int32_array(self.send_offsets.expert_offset, self.array_shapes.offsets)

    @functools.cached_property
    def num_recv(self) -> torch.Tensor:
        return self._int32_array(self.send_offsets.num_recv, (1,))

    @functools.cached_property
    def rank_count(self) -> torch.Tensor:
        return self._int32_array(self.send_offsets.rank_count, self.array_shapes.rank_count)

    @functools.cached_property
    def expert_count(self) -> torch.Tensor:
        return self._int32_array(self.send_offsets.expert_count, self.array_shapes.expert_count)

    def _int32_array(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        end = offset + 4 * math.prod(shape)
        return self.send_block[offset:end].view(torch.int32).view(shape)


@dataclass(frozen=True)
class Recv:
    """What one rank received from `Buffer.dispatch`. N = received tokens, H = hidden, K = topk.

    The tensors are ordinary tensors: valid as long as they are held, also after later calls and
    after `Buffer.destroy()`.

    Attributes:
        x: rows of the layout, or a pair (rows, scales) if they are quantised.
            "token": [N, H], one row per (token, this rank), by source rank, then token.
            "expert": [plan.expert_offsets[-1], H], grouped by local expert; in a group by source
            rank, then token. The content of alignment padding is unspecified.
            "padded": [L, R * max_tokens, H]; the first tokens_per_expert[e] rows of e are valid.
            With host_sync=False "token" has R * max_tokens rows and "expert" the most possible.
        topk_idx: local expert ids, dtype of the dispatched topk_idx.
            "token": [N, K], -1 where the expert is on another rank. "expert": [rows], the expert of
            each row, -1 for padding. "padded": None.
        topk_weights: fp32, 0 where there is no expert; None if dispatched without weights.
            "token": [N, K]. "expert": [rows]. "padded": [L, R * max_tokens].
        tokens_per_expert: int32 [L], distinct tokens per local expert, without padding.
        num_tokens: int32 [1], N.
        plan: for `combine` and for replay.
        event: completion of the call.
        hook: with return_recv_hook=True, a function that completes the receive; else None.
        global_scale: with quant="nvfp4", fp32 [rows] ("padded": [L, R * max_tokens]), the global
            scale of the rank that each row comes from: row = q * scale * global_scale. Else None.
    """

    x: Rows
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    plan: Plan
    event: Event
    hook: Callable[[], None] | None = None
    global_scale: torch.Tensor | None = None

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        return self.plan.tokens_per_expert

    @property
    def num_tokens(self) -> torch.Tensor:
        return self.plan.num_recv


_T = TypeVar("_T", Plan, Recv)


def made_of(kind: type[_T], **fields: Any) -> _T:
    """A record with all these fields, in a third of its constructor's time, which calls pay."""
    made = object.__new__(kind)
    made.__dict__.update(fields)
    return made


def changed(record: _T, **changes: Any) -> _T:
    """As dataclasses.replace, in a tenth of its time, which calls pay."""
    made = object.__new__(type(record))
    made.__dict__.update(record.__dict__, **changes)
    return made


class Combined(NamedTuple):
    """What `Buffer.combine` returns with async_op=True or return_recv_hook=True."""

    y: torch.Tensor
    event: Event
    hook: Callable[[], None] | None


class Statistics(NamedTuple):
    """What `Buffer.statistics` returns; tensors on the Buffer's device.

    Attributes:
        received_tokens: int64 [local_experts], tokens that dispatches have delivered to each expert
            of this rank: the sum of `recv.tokens_per_expert` over all calls, replays included. None
            where the transport does not count (`caps.received_tokens`).
        max_wait_us: float32 [num_ranks], the longest time in microseconds that a call on this rank
            has waited at once for something that a rank had to signal: that it enters the call,
            that its rows are there, that it has finished. A large number names a rank that comes
            late. None where waits are not timed by rank (`caps.wait_times`).
    """

    received_tokens: torch.Tensor | None
    max_wait_us: torch.Tensor | None


class LinkTraffic(NamedTuple):
    """What one rank sent over one kind of link, counted where it was sent.

    Attributes:
        rows: token rows (dispatch), rows of sums (combine).
        bytes: of those rows, scales included.
        meta_bytes: what travels with them: routing records, weights.
    """

    rows: int
    bytes: int
    meta_bytes: int


class OperationTraffic(NamedTuple):
    """`LinkTraffic` of one operation: to the rank itself, inside its node, to other nodes."""

    local: LinkTraffic
    node: LinkTraffic
    rail: LinkTraffic


class LinkCounters(NamedTuple):
    """What `Buffer.link_counters` returns."""

    dispatch: OperationTraffic
    combine: OperationTraffic
