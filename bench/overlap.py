"""How much of the communication hides behind the experts of another micro-batch.

A grouped GEMM (one matrix product per local expert, of as many rows as an expert gets on average)
runs on the current stream, and a dispatch or combine on the communication stream beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from timing import SEPARATE, Stopwatch, Times
from workload import Workload

WIDTH = {"cuda": 2048, "cpu": 32}  # columns of an expert's weights, where nothing else is asked


@dataclasses.dataclass(frozen=True)
class Started:
    """A call that runs on its own stream: what it gives, and how to wait for it there."""

    result: Any
    wait: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Microseconds (p50 of the slowest rank) of each alone, and the times of both at once."""

    alone_us: float
    gemm_us: float
    together: Times


class GroupedGemm:
    """The matrix products of the local experts."""

    def __init__(self, workload: Workload, width: int | None):
        config, routing = workload.config, workload.routing
        experts = max(len(routing.local_experts(workload.rank)), 1)
        rows = -(-routing.num_ranks * routing.tokens * routing.topk // routing.num_experts)
        width = width or WIDTH[config.device.type]

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=config.device, dtype=workload.combine_dtype)

        self._x = numbers(experts, rows, config.hidden)
        self._weights = numbers(experts, config.hidden, width)
        self._out = numbers(experts, rows, width)
        self.shape = f"{experts} x [{rows}, {config.hidden}] @ [{config.hidden}, {width}]"

    def run(self) -> torch.Tensor:
        return torch.bmm(self._x, self._weights, out=self._out)


def measure(
    stopwatch: Stopwatch,
    gemm: GroupedGemm,
    start: Callable[[], Started],
    check: Callable[[Any], int],
) -> tuple[Overlap, int]:
    """The times, and the wrong elements on this rank. Collective."""

    def alone() -> Any:
        started = start()
        started.wait()
        return started.result

    def together() -> Any:
        started = start()
        gemm.run()
        started.wait()
        return started.result

    wrong = check(alone())
    times, result = stopwatch.measure(alone, SEPARATE)
    wrong += check(result)
    gemm_times, _ = stopwatch.measure(gemm.run, SEPARATE)
    both, result = stopwatch.measure(together, SEPARATE)
    wrong += check(result)
    return Overlap(times.p50_us, gemm_times.p50_us, both), wrong
