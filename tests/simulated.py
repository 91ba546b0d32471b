"""GPU transports on simulated devices, with tensors on the CPU: see docs/simulator.md."""

import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "build" / "tests" / "tests" / "sim"
PATH = FOLDER / f"_sim{importlib.machinery.EXTENSION_SUFFIXES[0]}"

needs_simulator = pytest.mark.skipif(
    not PATH.exists(), reason="make test-cpp builds the simulator, where pybind11 is there"
)


def load() -> ModuleType:
    """The module _sim that `make test-cpp` builds."""
    loader = importlib.machinery.ExtensionFileLoader("_sim", str(PATH))
    spec = importlib.util.spec_from_loader("_sim", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def install() -> None:
    """Every Buffer of this process that is made from now on has a simulated device."""
    from epcomm import native

    sim = load()

    class Buffer:
        """A native Buffer whose calls are complete when they return, as on the CPU."""

        def __init__(self, *args: Any, **kwargs: Any):
            self._buffer = sim.Buffer(*args, **kwargs)
            caps = self._buffer.caps
            values = {name: getattr(caps, name) for name in dir(caps) if not name.startswith("_")}
            self.caps = SimpleNamespace(**{**values, "cuda": False})

        def __getattr__(self, name: str) -> Any:
            return getattr(self._buffer, name)

        def route(self, *args: Any) -> Any:
            try:
                return self._buffer.route(*args)
            finally:  # also where it throws: its kernels still use the plan's memory
                sim.synchronize()

        def dispatch(self, *args: Any) -> None:
            try:
                self._buffer.dispatch(*args)
            finally:
                sim.synchronize()
            self._buffer.check_faults()

        def combine(self, *args: Any) -> None:
            try:
                self._buffer.combine(*args)
            finally:
                sim.synchronize()
            self._buffer.check_faults()

    names = {name: getattr(sim, name) for name in dir(sim) if not name.startswith("__")}
    module = SimpleNamespace(**{**names, "Buffer": Buffer})
    native.module_of = lambda transport: module
