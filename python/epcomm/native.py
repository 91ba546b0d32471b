"""The extension modules, and which holds what transport. GPU modules are loaded on first use."""

from __future__ import annotations

import contextlib
import importlib
import re
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from . import _core, nvshmem
from .errors import Error

if TYPE_CHECKING:
    from .bootstrap import Bootstrap  # which imports this module, through quant


def sees_gpu() -> bool:
    """Does torch see a GPU?"""
    return torch.cuda.is_available()


def load_cuda() -> ModuleType | None:
    """The module with the GPU transports; None if this build has none."""
    try:
        return importlib.import_module("._cuda", __package__)
    except ModuleNotFoundError:
        return None


def module_of(transport: str) -> ModuleType:
    """The extension module that holds a transport. ValueError lists what this build has.

    "hierarchical" is that between GPUs where torch sees one, else that between processes.
    """
    between_gpus = transport in nvshmem.TRANSPORTS and sees_gpu()
    if transport in _core.transports() and not between_gpus:
        return _core
    cuda = load_cuda()
    if cuda is not None and transport in cuda.transports():
        check_device(cuda)
        return cuda
    if transport in nvshmem.built_transports():
        assert cuda is not None  # no build has NVSHMEM without it
        check_device(cuda)
        return nvshmem.load()
    if transport in _core.transports():
        raise ValueError(
            f"transport is {transport!r}, and torch sees a GPU, but this build cannot use it: "
            f"_nvshmem is {_core.nvshmem_status}; build epcomm with NVSHMEM (docs/rdma.md), or set "
            "CUDA_VISIBLE_DEVICES to nothing to work on tensors of the CPU"
        )
    has = _core.transports() + (cuda.transports() if cuda is not None else [])
    has += [name for name in nvshmem.built_transports() if name not in has]
    raise ValueError(
        f"transport is {transport!r}; this build has: {', '.join(has)} "
        f"(_cuda: {_core.cuda_status}; _nvshmem: {_core.nvshmem_status})"
    )


def refuse(bootstrap: Bootstrap, why: str) -> None:
    """Tells the other ranks, which are making a Buffer, that this one cannot take part."""
    with contextlib.suppress(Error):  # the reason why matters more than who did not hear it
        _core.refuse(bootstrap, why)


def check_device(cuda: ModuleType) -> None:
    """Raises ValueError if no GPU can run this build's kernels."""
    status = cuda.device_status()
    if status["count"] == 0:
        raise ValueError(
            f"a GPU transport was asked for, but CUDA finds no GPU ({status['reason']}); use "
            "transport='cpu'"
        )
    major, minor = map(int, status["capability"].split("."))
    if not _runs_on(cuda.archs.split(), major, minor):
        raise ValueError(
            f"this build of epcomm has kernels for {cuda.archs}, the GPU has compute capability "
            f"{major}.{minor}; rebuild with EPCOMM_CUDA_ARCHS={major}{minor}"
        )


def _runs_on(archs: list[str], major: int, minor: int) -> bool:
    """ "90a" and "90-real" are machine code: for exactly that chip; for it and later minors.

    A plain number also holds PTX, which the driver compiles for any later GPU.
    """
    for arch in archs:
        match = re.fullmatch(r"(\d+)(\d)([a-z]?)(-real|-virtual)?", arch)
        if match is None:
            continue
        has, exact, kind = (int(match[1]), int(match[2])), match[3] != "", match[4]
        same_major = has[0] == major and has[1] <= minor
        if has == (major, minor) or (not exact and same_major):
            return True
        if not exact and kind != "-real" and has <= (major, minor):
            return True
    return False
