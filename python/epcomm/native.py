"""The extension modules, and which holds what transport. GPU modules are loaded on first use."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from . import _core, env, nvshmem
from .errors import Error

if TYPE_CHECKING:
    from .bootstrap import Bootstrap  # which imports this module, through quant

_logger = logging.getLogger("epcomm")


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
    between_gpus = transport in nvshmem.TRANSPORTS and torch.cuda.is_available()
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


@dataclass(frozen=True)
class _Position:
    """What a rank tells the others when they agree on a transport."""

    named: str  # the transport that this rank asks for; "" = the group's choice
    alone: str  # what it would take by itself
    nvlink: bool  # could it take part in nvlink?
    rdma: bool = False  # could it take part in rdma, with batches of this size?
    machine: bytes = bytes(8)  # tells machines apart

    # The size never changes: ranks of different versions must get as far as comparing versions.
    _FORMAT = "<56s56s??6x8s"

    def packed(self) -> bytes:
        names = self.named.encode(), self.alone.encode()
        return struct.pack(self._FORMAT, *names, self.nvlink, self.rdma, self.machine)

    @classmethod
    def unpacked(cls, data: bytes) -> _Position:
        named, alone, nvlink, rdma, machine = struct.unpack(cls._FORMAT, data)
        text = [t.rstrip(b"\0").decode(errors="replace") for t in (named, alone)]
        return cls(text[0], text[1], nvlink, rdma, machine)


def agree_on_transport(
    bootstrap: Bootstrap, wanted: str, timeout: float, max_tokens: object = None
) -> str:
    """The transport that a Buffer takes; collective, also where it is named.

    "auto" takes nvlink if every GPU of the group can address every other, on all ranks or on none;
    else, over several machines and for small batches, rdma, if all ranks have it; else what each
    rank takes alone. A rank that names a transport (EPCOMM_TRANSPORT counts) gets it, and so do
    ranks of the group that name none. Logs the choice and its reason, and rank 0 a warning with all
    pairs that keep a group on one machine from nvlink.

    Raises PeerLost if a rank does not answer.
    """
    forced = env.text("EPCOMM_TRANSPORT") if wanted == "auto" else None
    alone, reason = _choose_alone() if wanted == "auto" else ("", "")
    named = forced or ("" if wanted == "auto" else str(wanted))
    gpu = alone == "nccl"
    rdma = gpu and _has_rdma(max_tokens)
    mine = _Position(named, alone, gpu and _has_nvlink(), rdma, _machine() if rdma else bytes(8))
    group = [_Position.unpacked(data) for data in _core.all_gather(bootstrap, mine.packed())]
    if wanted != "auto":
        return wanted
    others = [r for r, position in enumerate(group) if position.named]
    if forced is not None:
        choice, reason = forced, "EPCOMM_TRANSPORT says so"
    elif others:
        choice, reason = group[others[0]].named, f"rank {others[0]} asks for it"
    elif all(position.nvlink for position in group):
        choice, reason = _nvlink_or_nccl(bootstrap, timeout, _spread(group))
    elif _spread(group):
        choice, reason = "rdma", _RDMA_REASON
    else:
        choice = alone
        without = [r for r, position in enumerate(group) if not position.nvlink]
        if any(position.nvlink for position in group):
            reason += f"; nvlink is not in the build, or not for the GPU, of ranks {without}"
    _logger.info("transport auto: %s, because %s", choice, reason)
    return choice


def _choose_alone() -> tuple[str, str]:
    """What this rank can run, and why."""
    if not torch.cuda.is_available():
        return "cpu", "torch sees no GPU"
    if load_cuda() is None:
        return "cpu", f"this build has no GPU transport: {_core.cuda_status}"
    return "nccl", "NCCL finds a way between any GPUs"


def _has_nvlink() -> bool:
    """Is the nvlink transport in this build, with kernels for this GPU?"""
    cuda = load_cuda()
    if cuda is None or "nvlink" not in cuda.transports():
        return False
    try:
        check_device(cuda)
    except ValueError:
        return False
    return True


# rdma has not run between machines, nor passed its tests on a network path; until it has, it is
# taken by name.
AUTO_TAKES_RDMA = False
# Most tokens per rank that the kernels of small batches take (kTileTokens).
RDMA_MAX_TOKENS = 256
_RDMA_REASON = f"the ranks are on several machines, and max_tokens is at most {RDMA_MAX_TOKENS}"


def _has_rdma(max_tokens: object) -> bool:
    """Is the rdma transport in this build and able to run, and are batches small enough for it?"""
    if not (AUTO_TAKES_RDMA and isinstance(max_tokens, int) and max_tokens <= RDMA_MAX_TOKENS):
        return False
    try:
        module_of("rdma")
    except ValueError as error:
        _logger.info("transport auto: not rdma, because %s", error)
        return False
    return True


def _machine() -> bytes:
    """Names the running kernel, so that machines are told apart whatever their host names."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.blake2b(boot, digest_size=8).digest()


def _spread(group: list[_Position]) -> bool:
    """Can all ranks take part in rdma, and are they on several machines?"""
    return all(p.rdma for p in group) and len({p.machine for p in group}) > 1


def _nvlink_or_nccl(bootstrap: Bootstrap, timeout: float, spread: bool) -> tuple[str, str]:
    """Collective. nvlink if all pairs of GPUs have peer access; spread: else rdma can be taken."""
    cuda = load_cuda()
    assert cuda is not None  # every rank has nvlink
    access = cuda.check_peer_access(bootstrap, timeout)
    if access.good:
        return "nvlink", "every GPU of the group can address every other"
    if spread:
        return "rdma", _RDMA_REASON
    if bootstrap.rank == 0:
        _logger.warning("transport auto: nccl on all ranks instead of nvlink: %s", access.text)
    return "nccl", f"not all GPUs can address each other: {access.text}"


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
