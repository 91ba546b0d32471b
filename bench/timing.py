"""How calls are timed: per iteration, on every rank; the slowest rank of each iteration counts."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from shared import SharedBarrier

SEPARATE = "separate"
BACK_TO_BACK = "back-to-back"
CADENCES = (SEPARATE, BACK_TO_BACK)

Call = Callable[[], Any]

# Clock cycles that a GPU spins before a timed piece, so that the host is done launching it: about
# 1 ms for one call, and 0.3 ms, more than a launch takes, for each call of a back-to-back run.
SPIN_CYCLES = 2_000_000
SPIN_CYCLES_PER_CALL = 600_000


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds of the slowest rank of each iteration, over the iterations."""

    p50_us: float
    p99_us: float
    iterations: int


def nearest_rank(ordered: list[float], share: float) -> float:
    """The smallest measured value that at least share of the values do not exceed."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


class CpuTimer:
    """perf_counter around each call."""

    def __init__(self) -> None:
        self._barrier = SharedBarrier()

    def synchronize(self) -> None:
        pass

    def separate(self, call: Call, iterations: int) -> tuple[list[float], Any]:
        """All ranks enter every call together; the barrier is outside the timed piece."""
        seconds, result = [], None
        for _ in range(iterations):
            result = None  # give the memory back before the next call, as a layer would
            self._barrier.wait()
            start = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - start)
        return seconds, result

    def back_to_back(self, call: Call, iterations: int) -> tuple[list[float], Any]:
        """Calls follow each other at once; a rank may run ahead as far as the calls let it."""
        stamps, result = [], None
        self._barrier.wait()
        stamps.append(time.perf_counter())
        for _ in range(iterations):
            result = None
            result = call()
            stamps.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(stamps)], result


def device_barrier() -> Call:
    """What no rank's stream passes before every rank's got there. Collective.

    Flags in each other's memory let ranks go within a microsecond or two. NCCL's all-reduce, for
    GPUs that cannot reach each other, lets them go several apart.
    """
    barrier, error = None, ""
    try:
        from torch.distributed import _symmetric_memory

        memory = _symmetric_memory.empty(1, dtype=torch.int32, device="cuda")
        flags = _symmetric_memory.rendezvous(memory, group=dist.group.WORLD)
        flags.barrier()
        torch.cuda.synchronize()
        barrier = flags.barrier
    except Exception as problem:
        error = str(problem).split("\n")[0]
    errors: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if barrier is not None and not any(errors):
        return barrier
    token = torch.zeros(1, device="cuda")
    return lambda: dist.all_reduce(token)


class CudaTimer:
    """CUDA events around each call, on the current stream, behind a spin that hides the launch."""

    def __init__(self) -> None:
        self._barrier = device_barrier()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def separate(self, call: Call, iterations: int) -> tuple[list[float], Any]:
        starts, ends = self._events(iterations), self._events(iterations)
        result = None
        for start, end in zip(starts, ends, strict=True):
            result = None
            torch.cuda._sleep(SPIN_CYCLES)
            # No rank's clock starts before every rank's stream got here.
            self._barrier()
            start.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in zip(starts, ends, strict=True)], result

    def back_to_back(self, call: Call, iterations: int) -> tuple[list[float], Any]:
        events = self._events(iterations + 1)
        result = None
        torch.cuda._sleep(SPIN_CYCLES + SPIN_CYCLES_PER_CALL * iterations)
        self._barrier()
        events[0].record()
        for event in events[1:]:
            result = None
            result = call()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)], result

    @staticmethod
    def _events(count: int) -> list[torch.cuda.Event]:
        return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


class Stopwatch:
    """Warms up, chooses the number of iterations, times, and takes the slowest rank of each."""

    def __init__(self, device: torch.device, warmup: int, iterations: int, budget_s: float):
        """iterations 0: as many as fit budget_s, 5 to 200, the same on all ranks."""
        self._timer = CudaTimer() if device.type == "cuda" else CpuTimer()
        self._warmup = max(warmup, 1)
        self._iterations = iterations
        self._budget_s = budget_s

    def measure(self, call: Call, cadence: str) -> tuple[Times, Any]:
        """Times of the call, and what its last iteration returned. Collective."""
        timed = self._timer.separate if cadence == SEPARATE else self._timer.back_to_back
        # A garbage collection inside an iteration would be taken for communication.
        gc.collect()
        gc.disable()
        try:
            iterations = self._warm_up(call)
            seconds, result = timed(call, iterations)
        finally:
            gc.enable()
        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        ordered = sorted((slowest * 1e6).tolist())
        return Times(nearest_rank(ordered, 0.5), nearest_rank(ordered, 0.99), iterations), result

    def _warm_up(self, call: Call) -> int:
        seconds = torch.zeros(1, dtype=torch.float64)
        for _ in range(self._warmup):
            self._timer.synchronize()
            start = time.perf_counter()  # barriers take time too, if not timed time
            dist.barrier()
            call()
            self._timer.synchronize()
            seconds[0] = time.perf_counter() - start
        if self._iterations:
            return self._iterations
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return min(max(int(self._budget_s / max(seconds.item(), 1e-6)), 5), 200)
