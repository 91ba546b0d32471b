"""Makes a published engine importable in this process, without a GPU, with epcomm as its deep_ep.

`make engines` puts the packages of each engine, as published and unmodified, into a folder of their
own; `load` adds that folder to sys.path. An engine imports some packages long before it knows
whether it needs them. Some are left out: Triton, which takes 1 GB, torchvision, which must fit
torch, and sgl_kernel, for GPUs only. Where they are missing, a placeholder takes their place: it
can be imported, subclassed and used as a decorator, and computes nothing.
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Of the first test of an engine, which imports it on all ranks, on a busy machine.
TIMEOUT_S = 400.0


class _Anything:
    """What a placeholder's attributes are. As a decorator it returns the function it is given."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else self

    def __getattr__(self, name: str) -> "_Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __getitem__(self, key: object) -> "_Anything":
        return self


class _Placeholder(ModuleType):
    __version__ = "0"  # older than anything that is asked for

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else _Anything()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a placeholder for some packages and everything in them."""

    def __init__(self, names: Sequence[str]):
        self._names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname.split(".")[0] not in self._names:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def folder(name: str) -> Path:
    """Where `make engines` put an engine; EPCOMM_TEST_ENGINES names another parent folder."""
    parent = os.environ.get("EPCOMM_TEST_ENGINES") or Path(sys.prefix) / "engines"
    path = Path(parent) / name
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is missing, which holds {name} for tests/engines; `make engines` installs it"
        )
    return path


def load(name: str, asks: Sequence[str], placeholders: Sequence[str], install: bool = True) -> None:
    """For a fresh rank process, before anything imports the engine. May be called again.

    asks: modules of other packages that ask whether some of `placeholders` are there. They are
        imported first, so that they learn the truth.
    placeholders: packages to replace if they are missing.
    install: put epcomm in the place of deep_ep.
    """
    import epcomm.compat

    path = str(folder(name))
    if path in sys.path:
        return
    sys.path.insert(0, path)
    warnings.simplefilter("ignore")  # of what else the engine could use
    # The engines' small compiled functions stay Python: nothing that is tested here is in them,
    # and torch.compile would run a C++ compiler on every rank.
    importlib.import_module("torch._dynamo").config.disable = True
    for module in ("torch.utils.flop_counter", *asks):
        importlib.import_module(module)
    missing = [p for p in placeholders if importlib.util.find_spec(p) is None]
    sys.meta_path.append(_Finder(missing))
    if install:
        epcomm.compat.install()


def ranks_device(device: str) -> torch.device:
    """Where the tensors of this rank are."""
    return (
        torch.device(device, torch.cuda.current_device())
        if device == "cuda"
        else torch.device("cpu")
    )
