"""Checks of what callers pass. Each error names the argument, its value and what is expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def tensor(
    name: str,
    value: Any,
    *,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
) -> torch.Tensor:
    """Checks one tensor; in `shape` an int must match, a str names a free size."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")
    if value.device.type != device.type or (device.index is not None and value.device != device):
        raise ValueError(f"{name} is on device {value.device}; expected {device}")
    if value.dtype not in dtypes:
        wanted = " or ".join(_short(d) for d in dtypes)
        raise ValueError(f"{name} has dtype {_short(value.dtype)}; expected {wanted}")
    matches = value.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not matches:
        wanted = "[" + ", ".join(map(str, shape)) + "]"
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {wanted}")
    if not value.is_contiguous():
        raise ValueError(
            f"{name} has strides {tuple(value.stride())}; expected a contiguous tensor, "
            f"pass {name}.contiguous()"
        )
    return value


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Checks that a value is one of a few."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Checks an int in [low, high]."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an int")
    number = int(value.__index__())
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}; expected {low} to {high}")
    return number


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
