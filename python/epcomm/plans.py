"""Where plans come from: a new routing, or the state of an earlier one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .endpoint import Endpoint
from .results import Plan, changed, made_of

MOST_HELD = 256 << 20
"""Bytes that the tensors of a small batch may take to spare the host a wait: more, and they are
made when it is known what they hold."""


class Routing(NamedTuple):
    """Where rows go: the arguments of these names of `Buffer.dispatch`. A plan, or topk_idx."""

    topk_idx: torch.Tensor | None
    plan: Plan | None
    layout: str
    expert_alignment: int
    host_sync: bool


def route(end: Endpoint, routing: Routing, dispatch: Any) -> Plan:
    """The plan to dispatch by: the one that was given, else a new one. Then this is collective.

    Args:
        dispatch: DispatchArgs of the rows that will move by it.
    """
    if routing.plan is not None:
        return routing.plan
    topk_idx = routing.topk_idx
    assert topk_idx is not None
    num_tokens, topk = topk_idx.shape
    sizes = end.send_block(num_tokens, topk)
    send_block = torch.empty(sizes.bytes, dtype=torch.uint8, device=end.device)
    args = end.module.RouteArgs(dispatch)
    args.topk_idx = topk_idx.data_ptr()
    args.index_type = end.index_types[topk_idx.dtype]
    args.num_tokens = num_tokens
    args.topk = topk
    args.layout = end.layouts[routing.layout]
    args.expert_alignment = routing.expert_alignment
    args.host_sync = routing.host_sync
    room = _room_ahead(end, routing, dispatch)
    args.ahead = room is not None
    native_plan = end.native.route(args, send_block.data_ptr())
    plan = _plan(end, native_plan, routing.layout, room, send_block, topk_idx.dtype)
    if routing.host_sync and room is None:
        _remember(end, plan, native_plan)
    return plan


def settle(end: Endpoint, plan: Plan, native_plan: Any) -> tuple[Plan, bool]:
    """Waits for the counts of a plan whose rows were sent ahead of them.

    Args:
        native_plan: of the plan, as it was dispatched.

    Returns the plan with its counts, and whether there was room enough, on all ranks: else nothing
    was moved.
    """
    native_plan, sent = end.native.settle(native_plan)
    _remember(end, plan, native_plan)
    plan = changed(
        plan,
        native=native_plan,
        num_recv_tokens=native_plan.num_recv_tokens,
        num_recv_rows=native_plan.num_recv_rows,
        recv_capacity=native_plan.num_recv_tokens,
    )
    return plan, sent


def _room_ahead(end: Endpoint, routing: Routing, dispatch: Any) -> tuple[int, int] | None:
    """Tokens and rows to make room for before the counts are known; None to wait for them.

    Alike on all ranks: whether it is None. Small batches get room for the most that can be
    received, since they are not sent again. Larger ones that follow each other receive about the
    same: a sixteenth more is cheap, and a guess that is too small costs a second dispatch.
    """
    if not (routing.host_sync and end.caps.sends_ahead):
        return None
    topk_idx = routing.topk_idx
    assert topk_idx is not None
    topk = topk_idx.shape[1]
    most_rows = end.max_recv_rows(routing.layout, topk, routing.expert_alignment)
    most = (end.max_recv_tokens, most_rows)
    if end.caps.small_batches:
        # The counts of a call that is made in halves come with its second.
        copies = topk if routing.layout == "expert" else 1
        held = end.max_recv_tokens * copies * (dispatch.row_bytes + dispatch.scale_bytes)
        return most if dispatch.whole and held <= MOST_HELD else None
    last = end.received.get((routing.layout, topk, routing.expert_alignment))
    if last is None:
        return None
    tokens, rows = (min(n + n // 16 + 64, limit) for n, limit in zip(last, most, strict=True))
    return tokens, rows


def _remember(end: Endpoint, plan: Plan, native_plan: Any) -> None:
    received = (native_plan.num_recv_tokens, native_plan.num_recv_rows)
    end.received[plan.layout, plan.topk, plan.expert_alignment] = received


def restore(
    end: Endpoint, state: list[int], send_block: torch.Tensor, recv_block: torch.Tensor | None
) -> Plan:
    """As `Buffer.restored_plan`."""
    native_plan = end.native.restore(state, send_block.data_ptr())
    if recv_block is not None:
        native_plan = native_plan.with_recv_block(recv_block.data_ptr())
    send_bytes = end.send_block(native_plan.num_tokens, native_plan.topk).bytes
    end.limits.tensor("send_block", send_block, (torch.uint8,), (send_bytes,))
    plan = _plan(end, native_plan, native_plan.layout.name, None, send_block, torch.int32)
    if recv_block is not None:
        recv_bytes = end.native.recv_block_bytes(plan.native, plan.recv_capacity)
        end.limits.tensor("recv_block", recv_block, (torch.uint8,), (recv_bytes,))
        plan = changed(plan, recv_block=recv_block)
    return plan


def _plan(
    end: Endpoint,
    native_plan: Any,
    layout: str,
    room: tuple[int, int] | None,
    send_block: torch.Tensor,
    index_dtype: torch.dtype,
) -> Plan:
    """A plan without a receive block. room: for tokens and rows, before the counts are known."""
    num_tokens, topk = native_plan.num_tokens, native_plan.topk
    alignment = native_plan.expert_alignment
    num_recv_tokens = native_plan.num_recv_tokens if native_plan.host_sync else None
    if room is not None:
        capacity, rows = room
    elif num_recv_tokens is not None:
        capacity, rows = num_recv_tokens, native_plan.num_recv_rows
    else:
        capacity = end.max_recv_tokens
        rows = end.max_recv_rows(layout, topk, alignment)
    return made_of(
        Plan,
        layout=layout,
        expert_alignment=alignment,
        num_tokens=num_tokens,
        topk=topk,
        num_recv_tokens=num_recv_tokens,
        num_recv_rows=rows,
        index_dtype=index_dtype,
        recv_capacity=capacity,
        native=native_plan,
        send_block=send_block,
        recv_block=None,
        send_offsets=end.send_block(num_tokens, topk),
        array_shapes=end.array_shapes,
    )
