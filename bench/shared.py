"""Memory and a barrier that the ranks of one machine share, nameless, so that nothing is left."""

from __future__ import annotations

import mmap
import os

import numpy as np
import torch
import torch.distributed as dist


def shared_memory(num_bytes: int) -> list[np.ndarray]:
    """Makes num_bytes of memory and maps that of all ranks: uint8 arrays, by rank. Collective."""
    fd = os.memfd_create("epcomm_bench")
    os.ftruncate(fd, max(num_bytes, 1))
    mine = torch.tensor([os.getpid(), fd, max(num_bytes, 1)])
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    mapped = []
    for pid, peer_fd, size in (entry.tolist() for entry in everyone):
        opened = os.open(f"/proc/{pid}/fd/{peer_fd}", os.O_RDWR)
        mapped.append(np.frombuffer(mmap.mmap(opened, size), np.uint8))
        os.close(opened)
    dist.barrier()  # nobody closes before everybody has opened
    os.close(fd)
    return mapped


class SharedBarrier:
    """Lets ranks go within microseconds of each other; a barrier over sockets takes hundreds."""

    def __init__(self) -> None:
        words = [memory.view(np.int64) for memory in shared_memory(8)]
        self._mine = words[dist.get_rank()]
        self._all = words
        self._round = 0

    def wait(self) -> None:
        # The first barrier sleeps: to spin while peers still work would take their cores from them.
        dist.barrier()
        self._round += 1
        self._mine[0] = self._round
        for word in self._all:
            while word[0] < self._round:
                os.sched_yield()  # there may be more ranks than cores
