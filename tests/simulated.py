"""GPU transports on simulated devices, with tensors on the CPU: see docs/simulator.md."""

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "build" / "tests" / "tests" / "sim"


def load() -> ModuleType | None:
    """The module _sim of `make test-cpp`, None if it was not built."""
    for path in FOLDER.glob("_sim.*.so"):
        spec = importlib.util.spec_from_file_location("_sim", path)
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


needs_simulator = pytest.mark.skipif(
    not list(FOLDER.glob("_sim.*.so")), reason="make test-cpp builds the simulator"
)


def install() -> None:
    """Every Buffer of this process that is made from now on has a simulated device."""
    from epcomm import native

    sim = load()
    if sim is None:
        raise RuntimeError(f"no simulator in {FOLDER}: run make test-cpp first")

    class Buffer:
        """A native Buffer whose calls are complete when they return, as on the CPU."""

        def __init__(self, *args: Any, **kwargs: Any):
            self._buffer = sim.Buffer(*args, **kwargs)
            caps = self._buffer.caps
            names = ("token_layout", "expert_layout", "padded_layout", "symmetric_outputs")
            self.caps = SimpleNamespace(cuda=False, **{name: getattr(caps, name) for name in names})

        def __getattr__(self, name: str) -> Any:
            return getattr(self._buffer, name)

        def route(self, *args: Any) -> Any:
            result = self._buffer.route(*args)
            sim.synchronize()
            return result

        def dispatch(self, *args: Any) -> None:
            self._buffer.dispatch(*args)
            sim.synchronize()
            self._buffer.check_faults()

        def combine(self, *args: Any) -> None:
            self._buffer.combine(*args)
            sim.synchronize()
            self._buffer.check_faults()

    names = {name: getattr(sim, name) for name in dir(sim) if not name.startswith("__")}
    module = SimpleNamespace(**{**names, "Buffer": Buffer})
    native.module_of = lambda transport: module
