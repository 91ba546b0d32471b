"""How the ranks of a Buffer find each other: small exchanges of bytes while it is made."""

from __future__ import annotations

import datetime
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from . import checks, env
from .errors import PeerLost

TIMEOUT_S = 30.0
"""Seconds that a wait for a peer may take, where nobody says otherwise."""


@runtime_checkable
class Bootstrap(Protocol):
    """What a Buffer needs of its group. Calls are collective, in the same order on all ranks."""

    @property
    def rank(self) -> int:
        """This process's rank, 0 to size - 1."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's data, by rank. All ranks pass the same number of bytes."""


class TorchBootstrap:
    """A `Bootstrap` over any torch process group: gloo, NCCL or both; the world or a subgroup.

    Moves uint8 tensors, never pickled objects, so a peer cannot make this process run code.

    Args:
        group: a `torch.distributed.ProcessGroup`; None = the default group.
        timeout: seconds that one exchange may take; then `PeerLost` with rank -1.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 30.0) -> None:
        if group is None:
            if not dist.is_initialized():
                raise ValueError(
                    "group is None and torch.distributed has no default group; call "
                    "torch.distributed.init_process_group first, or pass a group"
                )
            group = dist.group.WORLD
        self._group = group
        self._timeout = datetime.timedelta(seconds=timeout)
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("group does not contain this process; only its members may use it")
        self.size = dist.get_world_size(group)
        # An NCCL-only group moves CUDA tensors alone; every other kind takes CPU tensors.
        nccl_only = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl_only else None

    def all_gather(self, data: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = dist.all_gather(gathered, mine, group=self._group, async_op=True)
            if work is not None:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise PeerLost(
                "a rank was lost during init (epoch 0): the process group failed or did not "
                f"answer within {self._timeout.total_seconds():g} s: {error}",
                -1,
                "init",
                0,
            ) from error
        return [t.cpu().numpy().tobytes() for t in gathered]


def bootstrap_of(group: Any, timeout: Any) -> Bootstrap:
    """The Bootstrap for what a caller gave as group; timeout: as given, not yet checked."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return TorchBootstrap(group, set_up_seconds(timeout))
    if not isinstance(group, Bootstrap):
        raise TypeError(
            f"group is a {type(group).__name__}; expected a torch.distributed.ProcessGroup, None, "
            "or an object with the methods of epcomm.Bootstrap"
        )
    return group


def set_up_seconds(timeout: Any) -> float:
    """The timeout of set-up. One that the Buffer will refuse must still let ranks say so."""
    try:
        if timeout is None:
            timeout = env.number("EPCOMM_TIMEOUT", TIMEOUT_S)
        return checks.seconds("timeout", timeout)
    except (TypeError, ValueError):
        return TIMEOUT_S
