"""The groups that callers hand to deep_ep's constructors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from ...bootstrap import Bootstrap, TorchBootstrap


class MpiBootstrap:
    """A `Bootstrap` over a communicator with the methods of mpi4py. Its waits are MPI's: unbounded.

    Moves bytes by `Allgather`, never pickled objects by `allgather`.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank = int(comm.Get_rank())
        self.size = int(comm.Get_size())

    def all_gather(self, data: bytes) -> list[bytes]:
        gathered = np.empty((self.size, len(data)), dtype=np.uint8)
        self._comm.Allgather(np.frombuffer(data, dtype=np.uint8).copy(), gathered)
        return [row.tobytes() for row in gathered]


class Group:
    """Ranks of a deep_ep buffer. Making one exchanges nothing and needs no GPU.

    Args:
        group: a torch process group of any backend that contains this process, or None.
        comm: an mpi4py communicator, used where group is None.
    """

    def __init__(self, group: dist.ProcessGroup | None, comm: Any = None) -> None:
        if group is None and comm is None:
            raise ValueError("group and comm are both None; expected one of them")
        self._group = group
        self._comm = comm
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError("group does not contain this process; only its members may use it")
        else:
            self.rank, self.size = int(comm.Get_rank()), int(comm.Get_size())

    def bootstrap(self, timeout: float) -> Bootstrap:
        """For one use: an NCCL group moves its bytes through the GPU that is current now."""
        if self._group is None:
            return MpiBootstrap(self._comm)
        return TorchBootstrap(self._group, timeout)
