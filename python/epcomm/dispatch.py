"""The steps of `Buffer.dispatch`: check, route, make what is received into, send."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import checks
from . import quant as quantisation
from .endpoint import Endpoint, address
from .errors import Error
from .plans import Routing, route, settle
from .results import Plan, Recv, Rows, changed, made_of
from .streams import Call, CallOptions
from .tracing import profiled


class Moved(NamedTuple):
    """What crosses, and how it is received.

    Attributes:
        parts: element type and elements per row of the rows, and of their scales if there are.
        columns: scales are received column-major, not rearranged once they are there.
    """

    parts: Sequence[tuple[torch.dtype, int]]
    columns: bool


class Payload(NamedTuple):
    """What is sent: the arguments of these names of `Buffer.dispatch`."""

    x: Rows
    topk_weights: torch.Tensor | None
    quant: str | None
    quant_scale: torch.Tensor | float | None
    scale_layout: str


def dispatch_rows(end: Endpoint, payload: Payload, routing: Routing, options: CallOptions) -> Recv:
    """As `Buffer.dispatch`."""
    rows, scales = _check(end, payload, routing, options)
    scale = payload.quant_scale
    inputs = (
        *(rows, scales, routing.topk_idx, payload.topk_weights),
        scale if isinstance(scale, torch.Tensor) else None,
    )
    call = end.order.begin(options, inputs)
    moved = _moved(end, payload, rows, scales)
    args = _arguments(end, payload, moved, options, call)
    try:
        with call.allocating(), profiled("dispatch", rows, scales):
            plan = route(end, routing, args)
            sent = _set_rows(end, args, rows, scales, payload)
            plan, received = _send(end, plan, moved, args)
            del sent  # args pointed to it until here
            x, global_scale = _arrange_scales(end, received, payload)
    except (Error, ValueError):
        raise  # the same on all ranks that are in this call
    except BaseException:
        # This rank alone has failed half-way (no memory for a tensor, an interrupt): its peers
        # are in a call that it will not finish, and learn of it by this.
        end.destroy()
        raise
    topk_idx, topk_weights = received.get("topk_idx"), received.get("topk_weights")
    block = (plan.send_block, plan.recv_block)
    made = (*(x if isinstance(x, tuple) else (x,)), topk_idx, topk_weights, global_scale, *block)
    event = call.end(made)
    hook = None
    if options.return_recv_hook:
        native_plan = plan.native
        hook = end.hook(call, event, args, lambda: end.native.dispatch(native_plan, args), made)
    return made_of(
        Recv,
        x=x,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        plan=plan,
        event=event,
        hook=hook,
        global_scale=global_scale,
    )


def _check(
    end: Endpoint, payload: Payload, routing: Routing, options: CallOptions
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Checks every argument; splits x into rows and scales."""
    x, topk_weights, quant, quant_scale, scale_layout = payload
    topk_idx, plan, layout, expert_alignment, _ = routing
    end.native.check_usable()
    limits = end.limits
    limits.quantisation(x, quant, quant_scale)
    if (topk_idx is None) == (plan is None):
        raise ValueError(
            "topk_idx and plan are both "
            + ("missing" if plan is None else "given")
            + "; expected exactly one of them"
        )
    if plan is not None:
        limits.plan(plan)
    checks.call_options(options)
    rows, scales = limits.rows(x)
    num_tokens = rows.shape[0]
    if plan is None:
        assert topk_idx is not None
        limits.routing(topk_idx, num_tokens, layout, expert_alignment)
        topk = topk_idx.shape[1]
    else:
        if num_tokens != plan.num_tokens:
            raise ValueError(
                f"x has {num_tokens} tokens; expected the plan's num_tokens = {plan.num_tokens}"
            )
        topk = plan.topk
    limits.scale_layout(scale_layout, quant is not None or scales is not None)
    if topk_weights is not None:
        limits.tensor("topk_weights", topk_weights, (torch.float32,), (num_tokens, topk))
    return rows, scales


def _moved(
    end: Endpoint, payload: Payload, rows: torch.Tensor, scales: torch.Tensor | None
) -> Moved:
    parts: Sequence[tuple[torch.dtype, int]]
    if payload.quant is not None:
        parts = quantisation.FORMATS[payload.quant].moved(end.hidden)
    elif scales is None:
        parts = ((rows.dtype, rows.shape[1]),)
    else:
        parts = ((rows.dtype, rows.shape[1]), (scales.dtype, scales.shape[1]))
    columns = payload.scale_layout == "column" and end.caps.column_scales
    return Moved(parts, columns and parts[1][0].itemsize == 4)


def _arguments(
    end: Endpoint, payload: Payload, moved: Moved, options: CallOptions, call: Call
) -> Any:
    """DispatchArgs with what route needs to know; rows, plan and results are filled in later."""
    args = end.module.DispatchArgs()
    (dtype, width), *scales = moved.parts
    args.dtype = end.native_dtypes[dtype]
    args.row_bytes = width * dtype.itemsize
    for dtype, width in scales:
        args.scale_bytes = width * dtype.itemsize
    args.topk_weights = address(payload.topk_weights)
    args.num_sms = options.num_sms or 0
    args.stream = call.stream
    # Scales that are rearranged must be there: such a call is not made in halves.
    if options.return_recv_hook and (moved.columns or payload.scale_layout == "row"):
        end.send_half_only(args)
    return args


def _set_rows(
    end: Endpoint, args: Any, rows: torch.Tensor, scales: torch.Tensor | None, payload: Payload
) -> tuple[torch.Tensor | None, ...]:
    """Fills in what is sent; where the transport does not quantise on the way, quantised here.

    Returns the tensors that args points to, to be kept until they are sent.
    """
    quant = payload.quant
    if quant is not None:
        made = None
        if _has_global_scale(quant):
            made = quantisation.make_global_scale(rows, payload.quant_scale)
        if quant in end.fused_quants:
            args.x = rows.data_ptr()
            args.x_dtype = end.native_dtypes[rows.dtype]
            args.quant = getattr(end.module.Quant, quant)
            args.global_scale = address(made)
            return (made,)
        rows, scales = quantisation.quantize_to_move(rows, quant, made, args.num_sms)
    args.x = rows.data_ptr()
    args.scales = address(scales)
    return rows, scales


def _send(
    end: Endpoint, plan: Plan, moved: Moved, args: Any
) -> tuple[Plan, dict[str, torch.Tensor]]:
    """Fills in the plan and the tensors to receive into, and sends.

    Returns the plan, and what was received by the names of DispatchArgs.
    """
    args.index_type = end.index_types[plan.index_dtype]
    args.replay = plan.recv_block is not None
    args.recv_capacity = plan.recv_capacity
    args.row_capacity = plan.num_recv_rows
    received = _receive_tensors(end, plan, moved, args)
    native_plan, meta = plan.native, plan.recv_block
    if meta is None:
        meta = received.get("meta")
        native_plan = native_plan.with_recv_block(0 if meta is None else meta.data_ptr())
    if "scale_columns" in received:
        columns = received["scale_columns"]
        args.scale_column_bytes = columns.shape[-1] * columns.element_size()
    for name in received:
        if name != "meta":
            setattr(args, f"recv_{name}", received[name].data_ptr())
    end.native.dispatch(native_plan, args)
    if native_plan.unsettled:
        plan, sent = settle(end, plan, native_plan)
        if not sent:
            # Nothing of the first attempt is kept: the second may need its room.
            received.clear()
            args.recv_scale_columns = 0
            del meta
            return _send(end, plan, moved, args)
        received = _received_part(end, plan, received)
        return changed(plan, recv_block=received["meta"]), received
    if plan.recv_block is None:
        plan = changed(plan, native=native_plan, recv_block=meta)
    return plan, received


def _receive_tensors(end: Endpoint, plan: Plan, moved: Moved, args: Any) -> dict[str, torch.Tensor]:
    """What this rank receives into. WindowFull, on all ranks, if one has no room."""
    shapes = [(dtype, end.row_shape(plan, width)) for dtype, width in moved.parts]
    wanted = dict(zip(("x", "scales"), shapes, strict=False))
    columns: dict[str, Any] = {}
    if moved.columns:
        dtype, shape = wanted["scales"]
        columns["scale_columns"] = dtype, quantisation.column_shape(dtype, shape)
        if not end.caps.symmetric_outputs:  # there peers write rows of scales first
            del wanted["scales"]
    if plan.recv_block is None:
        meta_bytes = end.native.recv_block_bytes(plan.native, plan.recv_capacity)
        wanted["meta"] = (torch.uint8, (meta_bytes,))
    entries = end.slot_shape(plan)
    slots = {}
    if plan.layout != "padded":
        slots["topk_idx"] = (plan.index_dtype, entries)
    if args.topk_weights != 0:
        slots["topk_weights"] = (torch.float32, entries)
    peers_write_slots = plan.layout == "token" and end.caps.cuda and end.caps.symmetric_outputs
    if peers_write_slots:
        wanted |= slots
    made = end.tensors.make(list(wanted.values()))
    if made is None and plan.native.unsettled:
        args.recv_capacity = args.row_capacity = -1  # the call is made again, with what it needs
        return {}
    if made is None:
        # The others must learn of it: the call goes on just far enough to raise on all ranks.
        args.needed_bytes = sum(math.prod(s) * d.itemsize for d, s in wanted.values())
        args.free_bytes = end.native.free_bytes
        end.native.dispatch(plan.native, args)
        raise AssertionError("dispatch with a full window must raise")
    received = dict(zip(wanted, made, strict=True))
    own = columns if peers_write_slots else columns | slots
    for name, (dtype, shape) in own.items():
        received[name] = torch.empty(shape, dtype=dtype, device=end.device)
    return received


def _received_part(
    end: Endpoint, plan: Plan, received: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of tensors that were made with room for more, what the plan receives.

    Columns of scales stay as far apart as they are.
    """
    rows, entries = end.row_shape(plan, 0)[0], end.slot_shape(plan)[0]
    lengths = {
        "x": rows,
        "scales": rows,
        "topk_idx": entries,
        "topk_weights": entries,
        "meta": end.native.recv_block_bytes(plan.native, plan.recv_capacity),
    }
    for name, tensor in received.items():
        length = lengths.get(name)
        if length is not None and tensor.shape[0] != length:
            received[name] = tensor[:length]
    return received


def _arrange_scales(
    end: Endpoint, received: dict[str, torch.Tensor], payload: Payload
) -> tuple[Rows, torch.Tensor | None]:
    """Received rows, with scales as the caller wants them, and global scales."""
    x, scales = received["x"], received.get("scales")
    if "scale_columns" in received:
        return (x, quantisation.columns_of(received["scale_columns"], x.shape[-2])), None
    if scales is None:
        return x, None
    global_scale = None
    if _has_global_scale(payload.quant):
        scales, global_scale = quantisation.split_moved(scales, end.hidden)
    if payload.scale_layout == "column":
        scales = quantisation.column_major(scales)
    return (x, scales), global_scale


def _has_global_scale(quant: str | None) -> bool:
    return quant is not None and quantisation.FORMATS[quant].global_scale
