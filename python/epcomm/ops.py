"""torch custom ops, namespace `epcomm`: what `epcomm.autograd` is made of.

They can be traced by torch.compile and differentiated; each has a fake implementation and is
collective. Schemas hold tensors and plain values. A Buffer goes by its `name`; it must live as
long as its ops are called. A plan is three tensors, which no op changes: its two blocks, and
`state`, int64 on the CPU, what the host knows of it. Outputs that do not exist are empty.

Rows that carry no token (padding, the tail of a worst case) are zero, so that what is computed
from them adds nothing to a sum over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .buffer import Buffer, named
from .results import Recv
from .tracing import untraced

_PLAN = "Tensor send_block, Tensor recv_block, Tensor state, str buffer"
_SCHEMAS = {
    "dispatch": (
        "(Tensor x, Tensor topk_idx, Tensor? topk_weights, str buffer, str layout, "
        "SymInt expert_alignment, bool host_sync) -> (Tensor recv_x, Tensor recv_topk_idx, "
        "Tensor recv_topk_weights, Tensor counts, Tensor send_block, Tensor recv_block, "
        "Tensor state)"
    ),
    "replay": (
        "(Tensor x, Tensor? topk_weights, Tensor send_block, Tensor state, str buffer, "
        "str layout, SymInt num_recv_rows, SymInt recv_bytes) -> "
        "(Tensor recv_x, Tensor recv_topk_weights, Tensor recv_block)"
    ),
    "combine": (
        f"(Tensor x, Tensor? topk_weights, Tensor? bias, {_PLAN}, str layout, SymInt num_tokens)"
        " -> Tensor"
    ),
    "combine_topk_weights": f"(Tensor values, {_PLAN}, SymInt num_tokens, SymInt topk) -> Tensor",
}

_library = torch.library.Library("epcomm", "DEF")
_Implementation = Callable[..., Any]


def _define(name: str, real: _Implementation, fake: _Implementation) -> None:
    _library.define(name + _SCHEMAS[name], tags=(torch.Tag.needs_fixed_stride_order,))
    # Where a graph breaks, torch.compile must not look for another one inside the op.
    _library.impl(name, untraced(real), "CompositeExplicitAutograd")
    torch.library.register_fake(f"epcomm::{name}", fake, lib=_library)


# What the ops do.


def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer: str,
    layout: str,
    expert_alignment: int,
    host_sync: bool,
) -> tuple[Tensor, ...]:
    recv = named(buffer).dispatch(
        _aligned(x),
        topk_idx.contiguous(),
        None if topk_weights is None else topk_weights.contiguous(),
        layout=layout,
        expert_alignment=expert_alignment,
        host_sync=host_sync,
    )
    plan = recv.plan
    assert isinstance(recv.x, Tensor) and plan.recv_block is not None
    _zero_padding(recv)
    counts = torch.cat((plan.tokens_per_expert, plan.expert_offsets, plan.num_recv))
    state = torch.tensor(plan.native.state(), dtype=torch.int64)
    idx = topk_idx.new_empty(0) if recv.topk_idx is None else recv.topk_idx
    weights = _given(recv.topk_weights, x)
    return recv.x, idx, weights, counts, plan.send_block, plan.recv_block, state


def _replay(
    x: Tensor,
    topk_weights: Tensor | None,
    send_block: Tensor,
    state: Tensor,
    buffer: str,
    layout: str,
    num_recv_rows: int,
    recv_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    buf = named(buffer)
    # Peers write the records again: into memory of this call, as the plan's own is an input.
    recv = buf.dispatch(
        _aligned(x),
        topk_weights=None if topk_weights is None else topk_weights.contiguous(),
        plan=buf.restored_plan(state.tolist(), send_block, None),
    )
    assert isinstance(recv.x, Tensor) and recv.plan.recv_block is not None
    _zero_padding(recv)
    return recv.x, _given(recv.topk_weights, x), recv.plan.recv_block


def _combine(
    x: Tensor,
    topk_weights: Tensor | None,
    bias: Tensor | None,
    send_block: Tensor,
    recv_block: Tensor,
    state: Tensor,
    buffer: str,
    layout: str,
    num_tokens: int,
) -> Tensor:
    buf = named(buffer)
    y = buf.combine(
        _aligned(x),
        buf.restored_plan(state.tolist(), send_block, recv_block),
        topk_weights=None if topk_weights is None else topk_weights.contiguous(),
        bias=None if bias is None else _aligned(bias),
    )
    assert isinstance(y, Tensor)
    return y


def _combine_topk_weights(
    values: Tensor,
    send_block: Tensor,
    recv_block: Tensor,
    state: Tensor,
    buffer: str,
    num_tokens: int,
    topk: int,
) -> Tensor:
    buf = named(buffer)
    plan = buf.restored_plan(state.tolist(), send_block, recv_block)
    y = buf.combine_topk_weights(values.contiguous(), plan)
    assert isinstance(y, Tensor)
    return y


def _aligned(rows: Tensor) -> Tensor:
    """Contiguous, and on a GPU on 16 bytes, where gradients need not be."""
    rows = rows.contiguous()
    return rows.clone() if rows.is_cuda and rows.data_ptr() % 16 != 0 else rows


def _given(weights: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if weights is None else weights


def _zero_padding(recv: Recv) -> None:
    plan = recv.plan
    assert isinstance(recv.x, Tensor)
    if plan.num_recv_tokens is not None and plan.layout != "padded":
        received = plan.num_recv_tokens
        if plan.layout == "expert":
            received = sum(plan.native.tokens_per_expert)
        if received == plan.num_recv_rows:
            return  # the host knows that there is none
    if plan.layout == "expert":
        assert recv.topk_idx is not None
        padding = recv.topk_idx < 0
    else:
        count = plan.num_recv if plan.layout == "token" else plan.tokens_per_expert.unsqueeze(1)
        padding = torch.arange(recv.x.shape[-2], device=recv.x.device) >= count
    recv.x.masked_fill_(padding.unsqueeze(-1), 0)


# What the ops give: shapes and dtypes.


def _fake_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer: str,
    layout: str,
    expert_alignment: int,
    host_sync: bool,
) -> tuple[Tensor, ...]:
    buf = named(buffer)
    unknown = torch.library.get_ctx().new_dynamic_size
    num_tokens, topk = topk_idx.shape
    capacity: Any = unknown() if host_sync else buf.max_recv_tokens
    if layout == "token":
        num_recv_rows = capacity
    elif host_sync and layout == "expert":
        num_recv_rows = unknown()
    else:
        kind = getattr(buf._end.module.Layout, layout)
        num_recv_rows = buf._native.max_recv_rows(kind, topk, expert_alignment)
    recv_x = _fake_rows(x, buf, layout, num_recv_rows)
    slots = _slots(recv_x, layout, topk)
    no_idx = layout == "padded"
    return (
        recv_x,
        topk_idx.new_empty(0 if no_idx else slots),
        x.new_empty(0 if topk_weights is None else slots, dtype=torch.float32),
        x.new_empty(2 * buf.local_experts + 2, dtype=torch.int32),
        x.new_empty(
            unknown()
            if isinstance(num_tokens, torch.SymInt)
            else buf._native.send_block(num_tokens, topk).bytes,
            dtype=torch.uint8,
        ),
        x.new_empty(
            unknown()  # between processes a rank that forwards keeps as many rows as ids ask for
            if buf.caps.forwards
            else capacity * buf._native.recv_meta_bytes(topk, 1),
            dtype=torch.uint8,
        ),
        x.new_empty(unknown() if host_sync else _STATE_WORDS, dtype=torch.int64, device="cpu"),
    )


def _fake_replay(
    x: Tensor,
    topk_weights: Tensor | None,
    send_block: Tensor,
    state: Tensor,
    buffer: str,
    layout: str,
    num_recv_rows: int,
    recv_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    recv_x = _fake_rows(x, named(buffer), layout, num_recv_rows)
    weights = 0 if topk_weights is None else _slots(recv_x, layout, topk_weights.shape[1])
    return (
        recv_x,
        x.new_empty(weights, dtype=torch.float32),
        x.new_empty(recv_bytes, dtype=torch.uint8),
    )


def _fake_combine(
    x: Tensor,
    topk_weights: Tensor | None,
    bias: Tensor | None,
    send_block: Tensor,
    recv_block: Tensor,
    state: Tensor,
    buffer: str,
    layout: str,
    num_tokens: int,
) -> Tensor:
    return x.new_empty((num_tokens, x.shape[-1]))


def _fake_combine_topk_weights(
    values: Tensor,
    send_block: Tensor,
    recv_block: Tensor,
    state: Tensor,
    buffer: str,
    num_tokens: int,
    topk: int,
) -> Tensor:
    return values.new_empty((num_tokens, topk))


def _fake_rows(x: Tensor, buf: Buffer, layout: str, num_recv_rows: int) -> Tensor:
    if layout == "padded":
        return x.new_empty((buf.local_experts, buf.max_recv_tokens, x.shape[1]))
    return x.new_empty((num_recv_rows, x.shape[1]))


def _slots(recv_x: Tensor, layout: str, topk: int) -> tuple[int, ...]:
    """Shape of topk_weights beside these rows."""
    return (recv_x.shape[0], topk) if layout == "token" else tuple(recv_x.shape[:-1])


_STATE_WORDS = 11
"""Numbers of the state of a plan without host_sync, whose two lists are empty."""

_define("dispatch", _dispatch, _fake_dispatch)
_define("replay", _replay, _fake_replay)
_define("combine", _combine, _fake_combine)
_define("combine_topk_weights", _combine_topk_weights, _fake_combine_topk_weights)
OPS = torch.ops.epcomm


# Gradients. needs_input_grad must be alike on all ranks, since it says which calls are made.


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _x, topk_idx, _, ctx.buffer, ctx.layout, _, _ = inputs
    ctx.num_tokens, ctx.topk = topk_idx.shape
    ctx.save_for_backward(*output[4:])


def _dispatch_backward(ctx: Any, grad_x: Tensor, _: Any, grad_weights: Tensor, *rest: Any) -> Any:
    return (*_back(ctx, grad_x, grad_weights, 2), None, None, None, None)


def _save_replay(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, topk_weights, send_block, state, ctx.buffer, ctx.layout, _, _ = inputs
    ctx.num_tokens = x.shape[0]
    ctx.topk = 0 if topk_weights is None else topk_weights.shape[1]
    ctx.save_for_backward(send_block, output[2], state)


def _replay_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor, _grad_block: Any) -> Any:
    x, _, weights = _back(ctx, grad_x, grad_weights, 1)
    return (x, weights, None, None, None, None, None, None)


def _back(ctx: Any, grad_x: Tensor, grad_weights: Tensor, weights_at: int) -> Any:
    """Gradients of x, of nothing, and of topk_weights, input number weights_at."""
    plan = (*ctx.saved_tensors, ctx.buffer)
    x = weights = None
    if ctx.needs_input_grad[0]:
        x = OPS.combine(grad_x, None, None, *plan, ctx.layout, ctx.num_tokens)
    if ctx.needs_input_grad[weights_at]:
        weights = OPS.combine_topk_weights(grad_weights, *plan, ctx.num_tokens, ctx.topk)
    return x, None, weights


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, topk_weights, _, send_block, recv_block, state, ctx.buffer, ctx.layout, _ = inputs
    ctx.num_recv_rows = x.shape[0]
    weighted = topk_weights is not None
    rows = (x if ctx.needs_input_grad[1] else None, topk_weights) if weighted else (None, None)
    ctx.save_for_backward(send_block, recv_block, state, *rows)


def _combine_backward(ctx: Any, grad_y: Tensor) -> Any:
    send_block, recv_block, state, x, topk_weights = ctx.saved_tensors
    recv_bytes = recv_block.shape[0]
    plan = (send_block, recv_block, state, ctx.buffer)
    grad_x = grad_weights = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        routing = (send_block, state, ctx.buffer, ctx.layout, ctx.num_recv_rows, recv_bytes)
        rows, weights, _ = OPS.replay(grad_y, topk_weights, *routing)
        grad_x = rows
    if topk_weights is not None and ctx.needs_input_grad[0]:
        # A row that several slots share counts with the sum of their weights.
        of_row = weights.sum(1) if ctx.layout == "token" else weights
        grad_x = (of_row.unsqueeze(-1) * rows).to(rows.dtype)
    if topk_weights is not None and ctx.needs_input_grad[1]:
        values = (rows.float() * x.float()).sum(-1)
        if ctx.layout == "token":
            values = values.unsqueeze(1).expand(-1, topk_weights.shape[1])
        grad_weights = OPS.combine_topk_weights(values, *plan, *topk_weights.shape)
    grad_bias = grad_y if ctx.needs_input_grad[2] else None
    return (grad_x, grad_weights, grad_bias, None, None, None, None, None, None)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_backward(ctx: Any, grad_y: Tensor) -> Any:
    raise NotImplementedError(
        "second derivatives with respect to topk_weights: epcomm::combine_topk_weights has no "
        "gradient"
    )


def _differentiate(name: str, backward: _Implementation, save: _Implementation) -> None:
    torch.library.register_autograd(f"epcomm::{name}", backward, setup_context=save, lib=_library)


_differentiate("dispatch", _dispatch_backward, _save_dispatch)
_differentiate("replay", _replay_backward, _save_replay)
_differentiate("combine", _combine_backward, _save_combine)
_differentiate("combine_topk_weights", _no_backward, _save_nothing)
