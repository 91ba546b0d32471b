"""How much of the communication hides behind the experts of another micro-batch.

A grouped GEMM (one matrix product per local expert, of as many rows as an expert gets on average)
runs on the current stream, and a dispatch or combine on the communication stream beside it. The
GEMM leaves the SMs of the call free, as engines have theirs do: a kernel that deals its work out
to all SMs in advance has the share of those that are taken done when everything else is.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from timing import SEPARATE, Stopwatch, Times
from workload import Workload

MOST_SMS = 24  # of a call with num_sms=None
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
        self.device = config.device
        width = width or WIDTH[config.device.type]

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=config.device, dtype=workload.combine_dtype)

        self._x = numbers(experts, rows, config.hidden)
        self._weights = numbers(experts, config.hidden, width)
        self._out = numbers(experts, rows, width)
        self.shape = f"{experts} x [{rows}, {config.hidden}] @ [{config.hidden}, {width}]"

    def run(self) -> torch.Tensor:
        return torch.bmm(self._x, self._weights, out=self._out)


@contextlib.contextmanager
def gemm_leaves(num_sms: int, device: torch.device) -> Iterator[None]:
    """cuBLAS plans its kernels for all SMs of `device` but so many."""
    if device.type != "cuda":
        yield
        return
    # torch has loaded the library, and offers no such setting for its matrix products.
    cublas = ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).partition('.')[0]}")

    def set_target(count: int) -> None:
        handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
        if status := cublas.cublasSetSmCountTarget(handle, ctypes.c_int(count)):
            raise RuntimeError(f"cublasSetSmCountTarget({count}) returned {status}; expected 0")

    set_target(torch.cuda.get_device_properties(device).multi_processor_count - num_sms)
    try:
        yield
    finally:
        set_target(0)  # all of them


def measure(
    stopwatch: Stopwatch,
    gemm: GroupedGemm,
    start: Callable[[], Started],
    check: Callable[[Any], int],
    num_sms: int | None,
) -> tuple[Overlap, int]:
    """The times, and the wrong elements on this rank; num_sms: of the call. Collective."""

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
    with gemm_leaves(num_sms or MOST_SMS, gemm.device):
        both, result = stopwatch.measure(together, SEPARATE)
    wrong += check(result)
    return Overlap(times.p50_us, gemm_times.p50_us, both), wrong
