"""The groups that callers hand to deep_ep's constructors."""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...bootstrap import Bootstrap, TorchBootstrap
from ...errors import PeerLost


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


class StoreBootstrap:
    """A `Bootstrap` for some ranks of a process group, over the group's store.

    torch's process groups cannot leave out a rank that does not answer; their store can.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._store = store
        self._timeout = timeout
        self._calls = 0
        self.rank = rank
        self.size = size

    def all_gather(self, data: bytes) -> list[bytes]:
        keys = [f"{self._calls}/{r}" for r in range(self.size)]
        self._calls += 1
        try:
            self._store.set(keys[self.rank], data.hex())
            self._store.wait(keys, datetime.timedelta(seconds=self._timeout))
            return [bytes.fromhex(self._store.get(key).decode()) for key in keys]
        except RuntimeError as error:
            raise PeerLost(
                "a rank was lost during init (epoch 0): the store of the process group failed, or "
                f"a rank did not answer within {self._timeout:g} s: {error}",
                -1,
                "init",
                0,
            ) from error


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
        self._made_among: dict[tuple[int, ...], int] = {}
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError("group does not contain this process; only its members may use it")
            self._number = _groups_made[group.group_name]
            _groups_made[group.group_name] += 1
        else:
            self.rank, self.size = int(comm.Get_rank()), int(comm.Get_size())

    def bootstrap(self, timeout: float, members: tuple[int, ...] = ()) -> Bootstrap:
        """For one use: an NCCL group moves its bytes through the GPU that is current now.

        members: the ranks that take part; () = all.
        """
        if self._group is None:
            if members:
                raise NotImplementedError("masked ranks are not offered with comm; pass a group")
            return MpiBootstrap(self._comm)
        if members:
            return self._among(members, timeout)
        return TorchBootstrap(self._group, timeout)

    def _among(self, members: tuple[int, ...], timeout: float) -> StoreBootstrap:
        assert self._group is not None
        if not hasattr(self._group, "get_group_store"):
            raise NotImplementedError(
                f"masked ranks are not offered with torch {torch.__version__}: its process groups "
                "do not lend their store"
            )
        # The members count alike: they make the same Buffers in the same order.
        made = self._made_among.get(members, 0)
        self._made_among[members] = made + 1
        prefix = f"epcomm/{self._number}/{'_'.join(map(str, members))}/{made}"
        lent = self._group.get_group_store()
        store = dist.PrefixStore(prefix, lent)  # type: ignore[attr-defined]
        return StoreBootstrap(store, members.index(self.rank), len(members), timeout)


# Buffers that were made over a group, by its name; their order is alike on all its ranks.
_groups_made: Counter[str] = Counter()
