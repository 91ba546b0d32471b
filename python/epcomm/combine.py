"""The steps of `Buffer.combine`, of the tensors that it reads, and of its twin for slots."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from . import checks
from .endpoint import Endpoint, address
from .errors import WindowFull
from .results import Combined, Plan
from .slots import rows_of_slots
from .streams import Call, CallOptions
from .tracing import profiled


class Sum(NamedTuple):
    """What is summed, and where to: the arguments of these names of `Buffer.combine`."""

    x: torch.Tensor
    topk_weights: torch.Tensor | None
    bias: torch.Tensor | None
    out: torch.Tensor | None
    quant: str | None


def combine_rows(
    end: Endpoint, terms: Sum, plan: Plan, options: CallOptions
) -> torch.Tensor | Combined:
    """As `Buffer.combine`."""
    _check(end, terms, plan, options)
    x, topk_weights, bias, out, quant = terms
    block = (plan.send_block, plan.recv_block)
    call = end.order.begin(options, (x, topk_weights, bias, out, *block))
    made = None
    if out is None:
        with call.allocating():
            shape = (plan.num_tokens, end.hidden)
            out = made = torch.empty(shape, dtype=x.dtype, device=end.device)
    args = _arguments(end, x, out, options, call)
    args.topk_weights = address(topk_weights)
    args.bias = address(bias)
    if quant is not None:
        args.quant = getattr(end.module.Quant, quant)
    if options.return_recv_hook:
        end.send_half_only(args)
    with profiled("combine", out):
        end.native.combine(plan.native, args)
    event = call.end((made,))
    if options.return_recv_hook:
        keep = (x, topk_weights, bias, out, *block)
        hook = end.hook(call, event, args, lambda: end.native.combine(plan.native, args), keep)
        return Combined(out, event, hook)
    return Combined(out, event, None) if options.async_op else out


def _check(end: Endpoint, terms: Sum, plan: Plan, options: CallOptions) -> None:
    """Checks every argument."""
    x, topk_weights, bias, out, quant = terms
    end.native.check_usable()
    limits = end.limits
    limits.plan(plan)
    checks.call_options(options)
    if quant is not None:
        checks.choice(
            f"quant of combine over the {end.native.transport} transport",
            quant,
            (None, *(kind.name for kind in end.caps.combine_quants)),
        )
    limits.tensor("x", x, limits.row_dtypes(), end.row_shape(plan, end.hidden))
    limits.row_memory("x", x)
    if topk_weights is not None:
        slots = (plan.num_tokens, plan.topk)
        limits.tensor("topk_weights", topk_weights, (torch.float32,), slots)
    for name, rows in (("bias", bias), ("out", out)):
        if rows is not None:
            limits.tensor(name, rows, (x.dtype,), (plan.num_tokens, end.hidden))
            limits.row_memory(name, rows)


def _arguments(
    end: Endpoint, x: torch.Tensor, out: torch.Tensor, options: CallOptions, call: Call
) -> Any:
    args = end.module.CombineArgs()
    args.x = x.data_ptr()
    args.out = out.data_ptr()
    args.dtype = end.native_dtypes[x.dtype]
    args.hidden = x.shape[-1]
    args.num_sms = options.num_sms or 0
    args.stream = call.stream
    return args


def combine_slots(
    end: Endpoint, values: torch.Tensor, plan: Plan, every_slot: bool, options: CallOptions
) -> torch.Tensor | Combined:
    """As `Buffer.combine_topk_weights`."""
    end.native.check_usable()
    end.limits.plan(plan)
    checks.call_options(options)
    if every_slot and plan.layout != "token":
        raise ValueError(f"every_slot is True with layout {plan.layout!r}; expected 'token'")
    end.limits.tensor("values", values, (torch.float32,), end.slot_shape(plan))
    call = end.order.begin(options, (values, plan.send_block, plan.recv_block))
    with call.allocating():
        record_bytes = end.native.recv_meta_bytes(plan.topk, 1)
        rows = rows_of_slots(values, plan, record_bytes, every_slot)
        y = rows.new_empty((plan.num_tokens, rows.shape[1]))
        args = _arguments(end, rows, y, options, call)
        args.by_token = True
        with profiled("combine_topk_weights", y):
            end.native.combine(plan.native, args)
        y = y[:, : plan.topk].contiguous()
    event = call.end((y,))
    return Combined(y, event, None) if options.async_op else y


def make_input(end: Endpoint, plan: Plan, dtype: torch.dtype | None) -> torch.Tensor:
    """As `Buffer.combine_input`."""
    end.native.check_usable()
    end.limits.plan(plan)
    dtype = end.dtype if dtype is None else dtype
    checks.choice("dtype", dtype, end.limits.row_dtypes())
    shape = end.row_shape(plan, end.hidden)
    made = end.tensors.make([(dtype, shape)])
    if made is None:
        rank, free = int(end.native.rank), end.native.free_bytes
        needed = math.prod(shape) * dtype.itemsize
        raise WindowFull(
            f"the window of rank {rank} is full: combine_input needs {needed} bytes, "
            f"{free} are free; drop tensors of earlier calls or make the "
            "Buffer with a larger window_bytes",
            rank,
            needed,
            free,
        )
    return made[0]
