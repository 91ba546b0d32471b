"""Where plans come from: a new routing, or the state of an earlier one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .endpoint import Endpoint
from .results import Plan, changed

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
    block_bytes = end.send_block(num_tokens, topk).bytes
    send_block = torch.empty(block_bytes, dtype=torch.uint8, device=end.device)
    args = end.module.RouteArgs()
    args.topk_idx = topk_idx.data_ptr()
    args.index_type = end.index_types[topk_idx.dtype]
    args.num_tokens = num_tokens
    args.topk = topk
    args.layout = getattr(end.module.Layout, routing.layout)
    args.expert_alignment = routing.expert_alignment
    args.dtype = dispatch.dtype
    args.row_bytes = dispatch.row_bytes
    args.scale_bytes = dispatch.scale_bytes
    args.weighted = dispatch.topk_weights != 0
    args.host_sync = routing.host_sync
    args.stream = dispatch.stream
    room = _room_ahead(end, routing, dispatch)
    args.ahead = room is not None
    native_plan = end.native.route(args, send_block.data_ptr())
    plan = _plan(end, native_plan, send_block, None, topk_idx.dtype)
    if room is not None:
        return changed(plan, recv_capacity=room[0], num_recv_rows=room[1])
    _remember(end, plan)
    return plan


def settle(end: Endpoint, plan: Plan) -> tuple[Plan, bool]:
    """Waits for the counts of a plan whose rows were sent ahead of them.

    Returns the plan with its counts, and whether there was room enough, on all ranks: else nothing
    was moved.
    """
    native, sent = end.native.settle(plan.native)
    plan = changed(
        plan,
        native=native,
        num_recv_tokens=native.num_recv_tokens,
        num_recv_rows=native.num_recv_rows,
        recv_capacity=native.num_recv_tokens,
    )
    _remember(end, plan)
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
    layout = getattr(end.module.Layout, routing.layout)
    most = (end.max_recv_tokens, end.max_recv_rows(layout, topk, routing.expert_alignment))
    if end.caps.small_batches:
        # The counts of a call that is made in halves come with its second.
        whole = dispatch.phase == end.module.Phase.all
        most_rows = end.max_recv_tokens * (topk if routing.layout == "expert" else 1)
        held = most_rows * (dispatch.row_bytes + dispatch.scale_bytes)
        return most if whole and held <= MOST_HELD else None
    last = end.received.get((routing.layout, topk, routing.expert_alignment))
    if last is None:
        return None
    tokens, rows = (min(n + n // 16 + 64, limit) for n, limit in zip(last, most, strict=True))
    return tokens, rows


def _remember(end: Endpoint, plan: Plan) -> None:
    if plan.num_recv_tokens is not None:
        key = (plan.layout, plan.topk, plan.expert_alignment)
        end.received[key] = (plan.num_recv_tokens, plan.num_recv_rows)


def restore(
    end: Endpoint, state: list[int], send_block: torch.Tensor, recv_block: torch.Tensor | None
) -> Plan:
    """As `Buffer.restored_plan`."""
    native_plan = end.native.restore(state, send_block.data_ptr())
    if recv_block is not None:
        native_plan = native_plan.with_recv_block(recv_block.data_ptr())
    send_bytes = end.send_block(native_plan.num_tokens, native_plan.topk).bytes
    end.limits.tensor("send_block", send_block, (torch.uint8,), (send_bytes,))
    plan = _plan(end, native_plan, send_block, recv_block, torch.int32)
    if recv_block is not None:
        recv_bytes = end.native.recv_block_bytes(plan.native, plan.recv_capacity)
        end.limits.tensor("recv_block", recv_block, (torch.uint8,), (recv_bytes,))
    return plan


def _plan(
    end: Endpoint,
    native_plan: Any,
    send_block: torch.Tensor,
    recv_block: torch.Tensor | None,
    index_dtype: torch.dtype,
) -> Plan:
    num_tokens, topk = native_plan.num_tokens, native_plan.topk
    sizes = end.send_block(num_tokens, topk)
    words = send_block.view(torch.int32)

    def int32_array(offset: int, count: int) -> torch.Tensor:
        return words[offset // 4 : offset // 4 + count]

    host_sync = native_plan.host_sync
    return Plan(
        layout=native_plan.layout.name,
        expert_alignment=native_plan.expert_alignment,
        num_tokens=num_tokens,
        topk=topk,
        num_recv_tokens=native_plan.num_recv_tokens if host_sync else None,
        num_recv_rows=native_plan.num_recv_rows
        if host_sync
        else end.max_recv_rows(native_plan.layout, topk, native_plan.expert_alignment),
        tokens_per_expert=int32_array(sizes.tokens_per_expert, end.local_experts),
        expert_offsets=int32_array(sizes.expert_offset, end.local_experts + 1),
        num_recv=int32_array(sizes.num_recv, 1),
        index_dtype=index_dtype,
        recv_capacity=native_plan.num_recv_tokens if host_sync else end.max_recv_tokens,
        native=native_plan,
        send_block=send_block,
        recv_block=recv_block,
        send_offsets=sizes,
        count_shapes=((end.num_ranks, end.num_ranks), (end.num_ranks, end.num_experts)),
    )
