"""What the machine itself can do: the same bytes between the same ranks, no library in between.

A raw link moves, on all ranks at once, as many bytes from each rank to each other rank as the
operation does, in one piece per pair and with nothing to look up, count or wait for.
"""

from __future__ import annotations

import ctypes
import os
import socket

import numpy as np
import torch
import torch.distributed as dist

from adapters.base import Adapter, Operation
from shared import shared_memory
from workload import Workload


def _offsets(byte_counts: np.ndarray) -> np.ndarray:
    """Where each sender's piece starts in each receiver's inbox: [sender, receiver]."""
    return np.cumsum(byte_counts, axis=0) - byte_counts


def _rotated_peers(rank: int, num_ranks: int) -> list[int]:
    """The order in which a rank sends, so that no receiver is hit by all at once."""
    return [(rank + i) % num_ranks for i in range(num_ranks)]


class MemcpyLink:
    """memcpy into the other processes' shared memory. Rows for the rank itself are copied as well:
    between processes of one machine they cost what any other row costs."""

    name = "memcpy"

    def __init__(self, workload: Workload, operation: str):
        byte_counts = workload.rows_between(operation) * workload.row_bytes(operation)
        rank, num_ranks = workload.rank, len(byte_counts)
        inboxes = shared_memory(int(byte_counts[:, rank].sum()))
        # As many different source bytes as the operation reads: a rank's own rows on the way out,
        # the rows that it received on the way back.
        sent = byte_counts[rank]
        self._source = np.ones(
            max(int(sent.max() if operation == "dispatch" else sent.sum()), 1), np.uint8
        )
        self._copies = []
        offsets, done = _offsets(byte_counts), 0
        for peer in _rotated_peers(rank, num_ranks):
            target = inboxes[peer].ctypes.data + int(offsets[rank, peer])
            first = 0 if operation == "dispatch" else done
            self._copies.append((target, self._source.ctypes.data + first, int(sent[peer])))
            done += int(sent[peer])
        self._inboxes = inboxes  # keeps the mappings

    def run(self) -> None:
        for target, source, num_bytes in self._copies:
            ctypes.memmove(target, source, num_bytes)

    def close(self) -> None:
        self._copies.clear()
        self._inboxes.clear()


STORAGE_DEVICE = 6  # place of the device in what torch sends along with a shared CUDA tensor


class PeerCopyLink:
    """Copy engines: cudaMemcpy into the other GPUs' memory, one stream per peer."""

    name = "copy-engine"

    def __init__(self, workload: Workload, operation: str):
        from torch.multiprocessing.reductions import reduce_tensor

        byte_counts = _without_local(workload, operation)
        rank, num_ranks = workload.rank, len(byte_counts)
        device = workload.config.device
        self._inbox = torch.empty(
            max(int(byte_counts[:, rank].sum()), 1), dtype=torch.uint8, device=device
        )
        handles: list = [None] * num_ranks
        dist.all_gather_object(handles, reduce_tensor(self._inbox))
        source = torch.ones(max(int(byte_counts[rank].max()), 1), dtype=torch.uint8, device=device)
        offsets = _offsets(byte_counts)
        self._copies = []
        for peer in _rotated_peers(rank, num_ranks)[1:]:
            size, first = int(byte_counts[rank, peer]), int(offsets[rank, peer])
            if size:
                rebuild, arguments = handles[peer]
                # Mapped as memory of this rank's own GPU: torch hands such a copy to the driver as
                # it is, which finds the way; between two torch devices it goes through the host.
                mapped = (
                    *arguments[:STORAGE_DEVICE],
                    device.index,
                    *arguments[STORAGE_DEVICE + 1 :],
                )
                target = rebuild(*mapped)[first : first + size]
                self._copies.append((target, source[:size], torch.cuda.Stream(device)))

    @staticmethod
    def works(num_ranks: int) -> bool:
        """Whether every rank can write every other rank's GPU; the same answer on all ranks."""
        mine = (
            socket.gethostname(),
            os.environ.get("CUDA_VISIBLE_DEVICES"),
            torch.cuda.current_device(),
        )
        everyone: list = [None] * num_ranks
        dist.all_gather_object(everyone, mine)
        works = os.environ.get("NCCL_P2P_DISABLE", "0") != "1" and all(
            host == mine[0]
            and visible == mine[1]  # ordinals name the same GPUs
            and (gpu == mine[2] or torch.cuda.can_device_access_peer(mine[2], gpu))
            for host, visible, gpu in everyone
        )
        answer = torch.tensor([int(works)])
        dist.all_reduce(answer, op=dist.ReduceOp.MIN)
        return bool(answer.item())

    def run(self) -> None:
        current = torch.cuda.current_stream()
        for target, source, stream in self._copies:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        for _, _, stream in self._copies:
            current.wait_stream(stream)

    def close(self) -> None:
        self._copies.clear()


class NcclLink:
    """NCCL's all-to-all of the remote bytes: where GPUs cannot write each other's memory."""

    name = "nccl"

    def __init__(self, workload: Workload, operation: str):
        byte_counts = _without_local(workload, operation)
        device = workload.config.device
        self._send_sizes = byte_counts[workload.rank].tolist()
        self._recv_sizes = byte_counts[:, workload.rank].tolist()
        self._send = torch.ones(sum(self._send_sizes), dtype=torch.uint8, device=device)
        self._recv = torch.empty(sum(self._recv_sizes), dtype=torch.uint8, device=device)

    def run(self) -> None:
        dist.all_to_all_single(self._recv, self._send, self._recv_sizes, self._send_sizes)

    def close(self) -> None:
        return None


def _without_local(workload: Workload, operation: str) -> np.ndarray:
    byte_counts = workload.rows_between(operation) * workload.row_bytes(operation)
    np.fill_diagonal(byte_counts, 0)  # rows for the rank itself do not touch a link
    return byte_counts


class RawLink(Adapter):
    """The fastest raw link that these ranks have, timed like any library."""

    layout = "-"

    def __init__(self, workload: Workload):
        if workload.config.device.type == "cpu":
            link = MemcpyLink
        elif PeerCopyLink.works(workload.routing.num_ranks):
            link = PeerCopyLink
        else:
            link = NcclLink
        self.transport = link.name
        self._links = {name: link(workload, name) for name in ("dispatch", "combine")}

    def operations(self) -> list[Operation]:
        return [Operation(name, "raw", link.run, lambda _: 0) for name, link in self._links.items()]

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        dist.barrier()  # torch complains if the owner of shared memory leaves before its users
