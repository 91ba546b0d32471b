"""epcomm moves the tokens of mixture-of-experts models between ranks.

    buf = epcomm.Buffer(group, num_experts=256, hidden=7168, topk=8, max_tokens=4096)
    recv = buf.dispatch(x, topk_idx, topk_weights)
    y = buf.combine(expert_out, recv.plan)

Importing epcomm loads neither torch nor CUDA; the first use of a class that needs them does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import env as _env
from ._core import version as __version__
from .config import show_config
from .errors import BufferUnusable, ConfigMismatch, Error, Evicted, PeerLost, WindowFull

if TYPE_CHECKING:
    from . import autograd
    from .bootstrap import Bootstrap, TorchBootstrap
    from .buffer import Buffer
    from .events import Event
    from .results import Combined, LinkCounters, LinkTraffic, OperationTraffic, Plan, Recv

_LAZY = {
    "Bootstrap": "bootstrap",
    "TorchBootstrap": "bootstrap",
    "Buffer": "buffer",
    "Combined": "results",
    "Event": "events",
    "LinkCounters": "results",
    "LinkTraffic": "results",
    "OperationTraffic": "results",
    "Plan": "results",
    "Recv": "results",
    "Statistics": "results",
}

__all__ = [
    "Bootstrap",
    "Buffer",
    "BufferUnusable",
    "Combined",
    "ConfigMismatch",
    "Error",
    "Event",
    "Evicted",
    "LinkCounters",
    "LinkTraffic",
    "OperationTraffic",
    "PeerLost",
    "Plan",
    "Recv",
    "Statistics",
    "TorchBootstrap",
    "WindowFull",
    "__version__",
    "autograd",
    "show_config",
]

_env.warn_unknown()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    if name == "autograd":
        return importlib.import_module(".autograd", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY) | {"autograd"})
