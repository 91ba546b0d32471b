"""The libraries that the benchmark can drive, behind one small interface."""

from __future__ import annotations

from adapters.base import Adapter, Operation, Options, Unavailable
from adapters.compat_adapter import CompatAdapter
from adapters.deep_ep_adapter import DeepEpAdapter
from adapters.epcomm_adapter import EpcommAdapter
from adapters.torch_adapter import TorchAdapter

ADAPTERS: dict[str, type[Adapter]] = {
    "epcomm": EpcommAdapter,
    "torch": TorchAdapter,
    "deep_ep": DeepEpAdapter,
    "compat": CompatAdapter,
}

__all__ = ["ADAPTERS", "Adapter", "Operation", "Options", "Unavailable"]
