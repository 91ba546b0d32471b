"""The extension modules, and which holds what transport. GPU modules are loaded on first use."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from types import ModuleType

import torch

from . import _core, env
from .bootstrap import Bootstrap
from .errors import Error

_logger = logging.getLogger("epcomm")


def load_cuda() -> ModuleType | None:
    """The module with the GPU transports; None if this build has none."""
    try:
        return importlib.import_module("._cuda", __package__)
    except ModuleNotFoundError:
        return None


def module_of(transport: str) -> ModuleType:
    """The extension module that holds a transport. ValueError lists what this build has."""
    if transport in _core.transports():
        return _core
    cuda = load_cuda()
    if cuda is not None and transport in cuda.transports():
        check_device(cuda)
        return cuda
    has = _core.transports() + (cuda.transports() if cuda is not None else [])
    raise ValueError(
        f"transport is {transport!r}; this build has: {', '.join(has)} (_cuda: {_core.cuda_status})"
    )


def refuse(bootstrap: Bootstrap, why: str) -> None:
    """Tells the other ranks, which are making a Buffer, that this one cannot take part."""
    with contextlib.suppress(Error):  # the reason why matters more than who did not hear it
        _core.refuse(bootstrap, why)


def choose_transport() -> str:
    """What `transport="auto"` stands for on this machine; logs the choice and its reason."""
    forced = env.text("EPCOMM_TRANSPORT")
    if forced is not None:
        choice, reason = forced, "EPCOMM_TRANSPORT says so"
    elif not torch.cuda.is_available():
        choice, reason = "cpu", "torch sees no GPU"
    elif load_cuda() is None:
        choice, reason = "cpu", f"this build has no GPU transport: {_core.cuda_status}"
    else:
        choice, reason = "nccl", "NCCL finds a way between any GPUs"
    _logger.info("transport auto: %s, because %s", choice, reason)
    return choice


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
