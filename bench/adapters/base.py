"""What the benchmark asks of an adapter."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from workload import Workload


class Unavailable(Exception):
    """This adapter cannot run here; its text is the one-line reason."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Command-line settings that concern adapters."""

    transport: str
    ranks_per_node: int | None  # for a transport that forwards between nodes, else None
    num_sms: int | None
    launches: tuple[str, ...]  # "eager", "graph"
    timeout: float
    transport_options: dict[str, str]
    like_deep_ep: bool  # epcomm is called as DeepEP V1 would be


@dataclasses.dataclass(frozen=True)
class Operation:
    """One timed call. wrong() counts the wrong elements of what call() returned, on this rank."""

    operation: str  # dispatch, combine or pair (both, chained)
    routing_mode: str  # fresh, replay, graph, packed, ...; docs/benchmarking.md has them all
    call: Callable[[], Any]
    wrong: Callable[[Any], int]


class Adapter(abc.ABC):
    """One library, set up for one case. Making, using and closing it is collective."""

    transport: str  # what moves the bytes
    layout: str  # of the rows that dispatch returns
    takes_transport: bool = False  # of epcomm
    takes_num_sms: bool = False
    num_sms: int | None = None  # what it was told to use, if it takes num_sms
    ranks_per_node: int | None = None  # where rows move by nodes, and it was told
    left_out: str = ""  # what was asked for and cannot be timed here, and why

    @abc.abstractmethod
    def __init__(self, workload: Workload, options: Options):
        """Raises Unavailable, on all ranks alike, if the library cannot run this case."""

    @abc.abstractmethod
    def operations(self) -> Iterable[Operation]:
        """What can be timed, each to be dropped before the next is asked for."""

    def close(self) -> None:
        """Frees what the library holds."""
        return


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph. It returns what the captured call did, refilled by each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is made at the first call must not be made while capturing
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(keep_alive: Any = call) -> Any:  # what the call refers to, the graph reads
        graph.replay()
        return result

    return replay


def spoil(*tensors: torch.Tensor | None) -> None:
    """Overwrites what was compared: the next call may get this memory, and must write it again."""
    for tensor in tensors:
        if tensor is not None:  # 0xff: NaN in every float format
            tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).fill_(0xFF)
