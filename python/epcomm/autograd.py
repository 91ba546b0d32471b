"""Differentiable dispatch and combine, for layers that train. torch.compile can trace them.

    from epcomm import autograd

    recv = autograd.dispatch(buf, x, topk_idx, topk_weights, layout="expert")
    out = experts(recv.x, recv.tokens_per_expert) * recv.topk_weights.unsqueeze(-1)
    y = autograd.combine(buf, out, recv.plan)

The backward of one is the other: every rank makes the same calls in its backward as its peers, so
which inputs require gradients, and whether the results take part in the loss, must be alike on all
ranks, those without tokens included. Calls run on the current stream. Formulas: docs/autograd.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .buffer import Buffer
from .ops import OPS

__all__ = ["Plan", "Recv", "combine", "dispatch"]


class Plan(NamedTuple):
    """The routing of one batch, as `epcomm.Plan`, made of tensors and sizes only.

    Attributes:
        layout: "token", "expert" or "padded".
        num_tokens: tokens of this rank that were dispatched.
        num_recv_rows: rows of `Recv.x` in layouts "token" and "expert", local experts in "padded".
        recv_topk_idx: as `Recv.topk_idx`; empty in layout "padded".
        counts: int32 [2 * local_experts + 2]: tokens_per_expert, expert_offsets, num_tokens.
        send_block, recv_block, state: as in `epcomm.ops`.
    """

    layout: str
    num_tokens: int
    num_recv_rows: int
    recv_topk_idx: torch.Tensor
    counts: torch.Tensor
    send_block: torch.Tensor
    recv_block: torch.Tensor
    state: torch.Tensor


class Recv(NamedTuple):
    """What one rank received; the attributes of `epcomm.Recv` with the same names and shapes.

    Rows that carry no token are zero, so they add nothing to the gradients of the experts.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor
    num_tokens: torch.Tensor
    plan: Plan


def dispatch(
    buf: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    *,
    plan: Plan | None = None,
    layout: str = "token",
    expert_alignment: int = 1,
    host_sync: bool = True,
) -> Recv:
    """`Buffer.dispatch`, differentiable in x and topk_weights. Collective, and so is its backward.

    Args:
        buf: lives at least as long as the graph of what this returns.
        x: [num_tokens, hidden] bfloat16, float16 or float32; quantised rows have no gradient.
        topk_idx, topk_weights, layout, expert_alignment, host_sync: as in `Buffer.dispatch`.
        plan: replays the routing of an earlier `dispatch` instead of topk_idx.

    Raises:
        As `Buffer.dispatch`, in the forward and in the backward.
    """
    if (topk_idx is None) == (plan is None):
        given = "missing" if plan is None else "given"
        raise ValueError(f"topk_idx and plan are both {given}; expected exactly one of them")
    if plan is None:
        recv_x, recv_topk_idx, recv_topk_weights, counts, *blocks = OPS.dispatch(
            x, topk_idx, topk_weights, buf.name, layout, expert_alignment, host_sync
        )
        plan = Plan(layout, x.shape[0], recv_x.shape[0], recv_topk_idx, counts, *blocks)
    else:
        recv_x, recv_topk_weights, _ = OPS.replay(
            *(x, topk_weights, plan.send_block, plan.state, buf.name),
            *(plan.layout, plan.num_recv_rows, plan.recv_block.shape[0]),
        )
    local_experts = plan.counts.shape[0] // 2 - 1
    return Recv(
        x=recv_x,
        topk_idx=None if plan.layout == "padded" else plan.recv_topk_idx,
        topk_weights=None if topk_weights is None else recv_topk_weights,
        tokens_per_expert=plan.counts[:local_experts],
        expert_offsets=plan.counts[local_experts:-1],
        num_tokens=plan.counts[-1:],
        plan=plan,
    )


def combine(
    buf: Buffer,
    x: torch.Tensor,
    plan: Plan,
    *,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Buffer.combine`, differentiable in x, topk_weights and bias. Collective, as its backward is.

    Args:
        buf: that made the plan; lives at least as long as the graph of what this returns.
        x: rows in the shape of `Recv.x`. Rows that carry no token are not looked at and get zero
            gradient.
        plan: of the `dispatch` that delivered the rows.
        topk_weights: [num_tokens, topk] float32 of this rank's tokens; on all ranks or on none.
        bias: [num_tokens, hidden] in the dtype of x.

    Returns:
        [num_tokens, hidden] in the dtype of x.
    """
    y: torch.Tensor = OPS.combine(
        x, topk_weights, bias, *plan[-3:], buf.name, plan.layout, plan.num_tokens
    )
    return y
