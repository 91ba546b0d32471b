"""Floats per slot (t, k), where they lie at the receiver."""

from __future__ import annotations

import torch

from .results import Plan


def _records(plan: Plan, record_bytes: int) -> torch.Tensor:
    """int32 [recv_capacity, words]: what the plan's receive block begins with (MetaLayout in
    token_layout.h). Records of rows that this rank forwards may follow."""
    assert plan.recv_block is not None
    words = plan.recv_block.view(torch.int32)[: plan.recv_capacity * (record_bytes // 4)]
    return words.view(plan.recv_capacity, record_bytes // 4)


def rows_of_slots(
    values: torch.Tensor, plan: Plan, record_bytes: int, every_slot: bool = False
) -> torch.Tensor:
    """One row of floats per received token from the values of its slots. No host wait.

    Args:
        values: float32 in the shape of `recv.topk_weights` of the plan's layout.
        record_bytes: of one token in the plan's receive block.
        every_slot: layout "token" only: also the values of slots whose expert is on another rank.

    Returns:
        float32 [recv_capacity, topk rounded up to a multiple of 4], 0 where a slot's expert is on
        another rank (except with every_slot). Rows from num_recv on are unspecified.
    """
    # A record begins with the row of the layout that carries each slot, -1 = expert elsewhere.
    row = _records(plan, record_bytes)[:, : plan.topk]
    rows = row.new_zeros((plan.recv_capacity, -(-plan.topk // 4) * 4), dtype=torch.float32)
    if values.numel() == 0:
        return rows
    if plan.layout != "token":
        # Records that were not received hold anything.
        at = row.clamp(0, values.numel() - 1).long()
        values = values.view(-1)[at]
    rows[:, : plan.topk] = values if every_slot else torch.where(row >= 0, values, 0.0)
    return rows


def rows_and_tokens(plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each received token lies, and which token of its source rank it is. No host wait.

    Returns:
        (int32 [recv_capacity, topk] row of the layout that carries each slot, -1 = expert
        elsewhere; int32 [recv_capacity] token). -1 in both from num_recv on.
    """
    assert plan.recv_block is not None
    # 3 * topk + 1 words, rounded up to 16 bytes; the block itself may be longer.
    records = _records(plan, -(-(3 * plan.topk + 1) // 4) * 16)
    received = torch.arange(len(records), device=records.device) < plan.num_recv
    row, token = records[:, : plan.topk], records[:, 3 * plan.topk]
    return torch.where(received.unsqueeze(1), row, -1), torch.where(received, token, -1)
