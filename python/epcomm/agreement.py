"""Which transport the ranks of a group take: all the same, so they decide together."""

from __future__ import annotations

import hashlib
import logging
import operator
import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from . import _core, env
from .native import check_device, load_cuda, module_of, sees_gpu

if TYPE_CHECKING:
    from .bootstrap import Bootstrap

_logger = logging.getLogger("epcomm")

# num_experts and max_tokens, as they were given.
Sizes: TypeAlias = "tuple[Any, Any]"
# Most ranks of a transport over NVSHMEM (kMaxLinkRanks).
_MOST_LINK_RANKS = 32


@dataclass(frozen=True)
class Choice:
    """What a group takes.

    Attributes:
        transport: its name.
        ranks_per_node: if the transport is "hierarchical" and the ranks are on several machines:
            how many form a node, so that each machine is one. Else None, also where the ranks of
            some machine are not consecutive.
    """

    transport: str
    ranks_per_node: int | None = None


@dataclass(frozen=True)
class _Position:
    """What a rank tells the others when they agree on a transport."""

    named: str  # the transport that this rank asks for; "" = the group's choice
    alone: str  # what it would take by itself
    nvlink: bool  # could it take part in nvlink?
    machine: bytes  # tells machines apart

    # The size never changes: ranks of different versions must get as far as comparing versions.
    _FORMAT = "<56s56s?7x8s"

    def packed(self) -> bytes:
        names = self.named.encode(), self.alone.encode()
        return struct.pack(self._FORMAT, *names, self.nvlink, self.machine)

    @classmethod
    def unpacked(cls, data: bytes) -> _Position:
        named, alone, nvlink, machine = struct.unpack(cls._FORMAT, data)
        text = [t.rstrip(b"\0").decode(errors="replace") for t in (named, alone)]
        return cls(text[0], text[1], nvlink, machine)


def agree_on_transport(bootstrap: Bootstrap, wanted: str, timeout: float, sizes: Sizes) -> Choice:
    """The transport that a Buffer takes; collective, also where it is named.

    "auto" takes nvlink if every GPU of the group can address every other. Else, over several
    machines, rdma where batches are small enough for it and hierarchical where they are larger, if
    all ranks can; else nccl where there are GPUs, or cpu. A rank that names a transport
    (EPCOMM_TRANSPORT counts) gets it, and so do ranks of the group that name none. Logs the choice
    and its reason, and rank 0 a warning with all pairs that keep a group on one machine from
    nvlink.

    Raises PeerLost if a rank does not answer.
    """
    forced = env.text("EPCOMM_TRANSPORT") if wanted == "auto" else None
    alone, reason = _choose_alone() if wanted == "auto" else ("", "")
    named = forced or ("" if wanted == "auto" else str(wanted))
    mine = _Position(named, alone, alone == "nccl" and _has_nvlink(), _machine())
    group = [_Position.unpacked(data) for data in _core.all_gather(bootstrap, mine.packed())]
    if wanted != "auto":
        return _with_nodes(wanted, group)
    others = [r for r, position in enumerate(group) if position.named]
    if forced is not None:
        choice, reason = forced, "EPCOMM_TRANSPORT says so"
    elif others:
        choice, reason = group[others[0]].named, f"rank {others[0]} asks for it"
    elif all(position.alone == "nccl" for position in group):
        choice, reason = _between_gpus(bootstrap, group, timeout, sizes, reason)
    else:
        choice = alone
    _logger.info("transport auto: %s, because %s", choice, reason)
    return _with_nodes(choice, group)


def _choose_alone() -> tuple[str, str]:
    """What this rank can run, and why."""
    if not sees_gpu():
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


def _machine() -> bytes:
    """Names the running kernel, so that machines are told apart whatever their host names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = platform.node().encode()
    return hashlib.blake2b(boot, digest_size=8).digest()


def _between_gpus(
    bootstrap: Bootstrap,
    group: list[_Position],
    timeout: float,
    sizes: Sizes,
    reason: str,
) -> tuple[str, str]:
    """Collective, of ranks that have a GPU each. What they take, and why."""
    access: Any = None
    if all(position.nvlink for position in group):
        cuda = load_cuda()
        assert cuda is not None  # every rank has nvlink
        access = cuda.check_peer_access(bootstrap, timeout)
        if access.good:
            return "nvlink", "every GPU of the group can address every other"
        reason = f"not all GPUs can address each other: {access.text}"
    elif any(position.nvlink for position in group):
        without = [r for r, position in enumerate(group) if not position.nvlink]
        reason += f"; nvlink is not in the build, or not for the GPU, of ranks {without}"
    if len({position.machine for position in group}) > 1:
        transport, why = _over_nvshmem(bootstrap, group, timeout, sizes)
        return (transport, why) if transport else ("nccl", f"{reason}; {why}")
    if access is not None and bootstrap.rank == 0:
        _logger.warning("transport auto: nccl on all ranks instead of nvlink: %s", access.text)
    return "nccl", reason


def _over_nvshmem(
    bootstrap: Bootstrap, group: list[_Position], timeout: float, sizes: Sizes
) -> tuple[str, str]:
    """Collective, of ranks on several machines. The transport over NVSHMEM, and why; or "", and
    what keeps the group from one."""
    why_not = ""
    try:
        module_of("rdma")  # the same module has both
    except Exception as error:  # whatever it is, the others wait for this rank's word
        why_not = str(error) or type(error).__name__
    mine = bytes([not why_not, _are_small(bootstrap.size, sizes)])
    told = _core.all_gather(bootstrap, mine)
    if why_not:
        return "", f"not rdma or hierarchical, because {why_not}"
    if without := [r for r, (able, _) in enumerate(told) if not able]:
        return "", f"not rdma or hierarchical, because ranks {without} cannot"
    if all(small for _, small in told):
        return "rdma", "the ranks are on several machines, and batches are small"
    why_not = _why_not_by_machines(bootstrap, group, timeout)
    if why_not:
        return "", f"not hierarchical, because {why_not}"
    return "hierarchical", "the ranks are on several machines, and batches are large"


def _are_small(num_ranks: int, sizes: Sizes) -> bool:
    """Does rdma take batches of these sizes? What is no number is refused later."""
    cuda = load_cuda()
    assert cuda is not None
    try:
        return not cuda.why_not_small_batches(num_ranks, *map(operator.index, sizes))
    except TypeError:
        return False


def _why_not_by_machines(bootstrap: Bootstrap, group: list[_Position], timeout: float) -> str:
    """Collective. What keeps the machines from being the nodes of hierarchical; "" = nothing."""
    if len(group) > _MOST_LINK_RANKS:
        return f"it takes at most {_MOST_LINK_RANKS} ranks"
    nodes = _ranks_per_machine(group)
    if nodes is None:
        return "the ranks of a machine are not consecutive, or not as many on each"
    if without := [r for r, position in enumerate(group) if not position.nvlink]:
        return f"ranks {without} cannot say whether GPUs address each other"
    cuda = load_cuda()
    assert cuda is not None
    good = bytes([cuda.check_peer_access_in_nodes(bootstrap, timeout, nodes).good])
    apart = [r for r, told in enumerate(_core.all_gather(bootstrap, good)) if told == b"\0"]
    return f"the GPUs of the machines of ranks {apart} cannot address each other" if apart else ""


def _ranks_per_machine(group: list[_Position]) -> int | None:
    """How many ranks form a node if each machine is one; the last may have fewer.

    None if the ranks of some machine are not consecutive, or machines differ otherwise.
    """
    machines = [position.machine for position in group]
    size = machines.count(machines[0])
    nodes = [machines[first : first + size] for first in range(0, len(machines), size)]
    one_each = all(len(set(node)) == 1 for node in nodes)
    return size if one_each and len(set(machines)) == len(nodes) else None


def _with_nodes(transport: str, group: list[_Position]) -> Choice:
    over_machines = len({position.machine for position in group}) > 1
    nodes = transport == "hierarchical" and over_machines
    return Choice(transport, _ranks_per_machine(group) if nodes else None)
