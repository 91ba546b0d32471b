"""What torch's compiler and profiler see of a call."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch
from torch._C._autograd import _profiler_enabled

_P = ParamSpec("_P")
_R = TypeVar("_R")


def untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, called as it is from compiled code: it works on addresses.

    As torch.compiler.disable, but does not import the compiler where nothing else has.
    """
    disabled: Callable[_P, _R] | None = None

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


def profiled(operation: str, *rows: torch.Tensor | None) -> AbstractContextManager[object]:
    """A range of torch.profiler around a call, named with the bytes of this rank's token rows.

    Where no profiler runs, none is made: making one costs more than a microsecond.
    """
    if not _profiler_enabled():
        return _NOTHING
    num_bytes = sum(part.nbytes for part in rows if part is not None)
    return torch.profiler.record_function(f"epcomm.{operation} {num_bytes} bytes")


_NOTHING = contextlib.nullcontext()
