"""Checks of what callers pass. Each error names the argument, its value and what is expected."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .events import Event
from .quant import FORMATS, ROW_DTYPES, check_global_scale
from .results import Plan, Rows
from .streams import CallOptions

QUANTISED_DTYPES = (torch.float8_e4m3fn, torch.uint8)
SCALE_DTYPES = (torch.float32, torch.int32, torch.uint8, torch.float8_e4m3fn)
INDEX_DTYPES = (torch.int64, torch.int32)
LAYOUTS = ("token", "expert", "padded")
QUANTS = (None, *FORMATS)
SCALE_LAYOUTS = ("row", "column")
INT32_MAX = 2**31 - 1


def dtype_name(dtype: torch.dtype) -> str:
    """Name without the module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Checks that a value is one of a few."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def integer(name: str, value: Any, low: int = -INT32_MAX, high: int = INT32_MAX) -> int:
    """Checks an int in [low, high]."""
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an int")
    number = int(value.__index__())
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}; expected {low} to {high}")
    return number


def integers(name: str, values: Iterable[Any]) -> list[int]:
    """Checks 32-bit ints."""
    return [integer(f"{name}[{i}]", value) for i, value in enumerate(values)]


def seconds(name: str, value: Any) -> float:
    """Checks a duration."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected seconds")
    if not 0 < value < 1e6:
        raise ValueError(f"{name} is {value} s; expected more than 0, less than 1e6")
    return float(value)


@dataclass(frozen=True)
class Limits:
    """What one Buffer takes."""

    buffer_id: int
    device: torch.device
    hidden: int
    topk: int
    max_tokens: int
    dtype: torch.dtype

    def tensor(
        self, name: str, value: Any, dtypes: Sequence[torch.dtype], shape: Sequence[int | str]
    ) -> torch.Tensor:
        """Checks one tensor; in `shape` an int must match, a str names a free size."""
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
        if value.device != self.device:
            raise ValueError(f"{name} is on device {value.device}; expected {self.device}")
        if value.dtype not in dtypes:
            wanted = " or ".join(map(dtype_name, dtypes))
            raise ValueError(f"{name} has dtype {dtype_name(value.dtype)}; expected {wanted}")
        got = value.shape
        if got != shape and not _matches(got, shape):
            wanted = "[" + ", ".join(map(str, shape)) + "]"
            raise ValueError(f"{name} has shape {list(got)}; expected {wanted}")
        if not value.is_contiguous():
            raise ValueError(
                f"{name} has strides {tuple(value.stride())}; expected a contiguous tensor, "
                f"pass {name}.contiguous()"
            )
        return value

    def row_dtypes(self) -> tuple[torch.dtype, ...]:
        """Element types of rows that are not wider than the Buffer's dtype."""
        return _row_dtypes(self.dtype)

    def row_memory(self, name: str, rows: torch.Tensor) -> None:
        """Checks the size of a row and, on a GPU, that it starts on 16 bytes."""
        row_bytes = rows.shape[-1] * rows.element_size()
        widest = self.hidden * self.dtype.itemsize
        if row_bytes == 0 or row_bytes % 16 != 0 or row_bytes > widest:
            raise ValueError(
                f"{name} has rows of {row_bytes} bytes; expected a multiple of 16, at most the "
                f"{widest} bytes of a row of {self.dtype}; pad hidden"
            )
        if self.device.type == "cuda" and rows.data_ptr() % 16 != 0:
            raise ValueError(
                f"{name} starts at address {rows.data_ptr():#x}; expected a multiple of 16, pass "
                f"{name}.clone()"
            )

    def rows(self, x: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Checks x of a dispatch, and splits a pair into rows and scales."""
        if not isinstance(x, (tuple, list)):
            if isinstance(x, torch.Tensor) and x.dtype in QUANTISED_DTYPES:
                raise ValueError(
                    f"x has dtype {dtype_name(x.dtype)} and no scales; expected a pair "
                    "(q, scales), or rows of bfloat16, float16 or float32"
                )
            self.tensor("x", x, self.row_dtypes(), ("num_tokens", self.hidden))
            rows, scales = x, None
        elif len(x) != 2:
            raise ValueError(
                f"x is a sequence of {len(x)}; expected a tensor or a pair (q, scales)"
            )
        else:
            rows, scales = x
            packed = isinstance(rows, torch.Tensor) and rows.dtype == torch.uint8
            width = "row_bytes" if packed else self.hidden
            self.tensor("x[0]", rows, QUANTISED_DTYPES, ("num_tokens", width))
            self.tensor("x[1]", scales, SCALE_DTYPES, (rows.shape[0], "num_scales"))
            integer("x[1].shape[1]", scales.shape[1], 1, INT32_MAX)
        self.row_memory("x" if scales is None else "x[0]", rows)
        if rows.shape[0] > self.max_tokens:
            raise ValueError(
                f"x has {rows.shape[0]} tokens; expected at most max_tokens = {self.max_tokens}; "
                "make the Buffer with a larger max_tokens or dispatch in smaller batches"
            )
        return rows, scales

    def quantisation(self, x: Rows, quant: str | None, quant_scale: Any) -> None:
        """Checks rows that a dispatch is to quantise, before `rows`."""
        choice("quant", quant, QUANTS)
        if quant_scale is not None and quant != "nvfp4":
            raise ValueError(f"quant_scale is given with quant {quant!r}; only 'nvfp4' has one")
        if quant is None:
            return
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"quant is {quant!r} but x is a pair already; expected one tensor")
        FORMATS[quant].layout(self.hidden)  # says what hidden must be
        if quant_scale is not None:
            check_global_scale("quant_scale", quant_scale, self.device)

    def scale_layout(self, scale_layout: str, scaled: bool) -> None:
        """Checks where the scales that a dispatch returns shall be."""
        choice("scale_layout", scale_layout, SCALE_LAYOUTS)
        if scale_layout == "column" and not scaled:
            raise ValueError(
                "scale_layout is 'column' with no scales; expected quant, or x as a pair"
            )

    def routing(self, topk_idx: Any, num_tokens: int, layout: str, expert_alignment: int) -> None:
        """Checks what a new routing is made from."""
        choice("layout", layout, LAYOUTS)
        integer("expert_alignment", expert_alignment, 1, 2**20)
        self.tensor("topk_idx", topk_idx, INDEX_DTYPES, (num_tokens, "topk"))
        integer("topk_idx.shape[1]", topk_idx.shape[1], 1, self.topk)

    def plan(self, plan: Any) -> None:
        """Checks that a plan is one, and this Buffer's."""
        if not isinstance(plan, Plan):
            raise TypeError(
                f"plan is a {type(plan).__name__}; expected the epcomm.Plan of a dispatch"
            )
        if plan.native.buffer_id != self.buffer_id:
            raise ValueError(
                f"plan was made by another Buffer (id {plan.native.buffer_id}); expected a plan of "
                f"this Buffer (id {self.buffer_id})"
            )


def _matches(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    if len(shape) != len(wanted):
        return False
    for got, want in zip(shape, wanted, strict=True):
        if got != want and not isinstance(want, str):
            return False
    return True


@functools.lru_cache(maxsize=8)
def _row_dtypes(widest: torch.dtype) -> tuple[torch.dtype, ...]:
    return tuple(d for d in ROW_DTYPES if d.itemsize <= widest.itemsize)


def call_options(options: CallOptions) -> None:
    """Checks the arguments that say how a call runs."""
    event = options.previous_event
    if event is not None and not isinstance(event, (Event, torch.cuda.Event)):
        raise TypeError(
            f"previous_event is a {type(event).__name__}; expected the event of a call, a "
            "torch.cuda.Event or None"
        )
    if options.async_op and options.return_recv_hook:
        raise ValueError("async_op and return_recv_hook are both True; expected at most one")
    if options.num_sms is not None:
        integer("num_sms", options.num_sms, 1, 1024)
