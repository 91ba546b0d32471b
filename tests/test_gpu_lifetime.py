"""Buffers on GPUs that come and go, and ranks that are killed in the middle of calls.

EPCOMM_TEST_CALLS as in tests/test_gpu_soak.py. tests/test_soak.py runs the same on the CPU.
"""

import gc
import itertools
import os
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import launcher
from soak_calls import LARGE, MIB, SMALL, calls, draw, make, raise_if_wrong, ranks, round_trip

pytestmark = pytest.mark.gpu

LOST_TIMEOUT_S = 3.0


def holdings(group: Any, device: str) -> tuple[int, ...]:
    """Free bytes of the GPU, file descriptors and threads of this process."""
    gc.collect()
    free = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    dist.barrier(group)  # what peers still map is not free
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    dist.barrier(group)  # nobody takes memory before all have looked
    return free, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def run_cycles(
    group: Any, device: str, transport: str, options: list[dict[str, str]], count: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Makes and ends Buffers after a few calls on each; what is held before and after."""
    before: tuple[int, ...] = ()
    # CUDA loads a kernel when it is first called: what is counted repeats calls made before.
    warm_up = len(options) * max(4, count // 8)
    for cycle in range(warm_up + count):
        if cycle == warm_up:
            before = holdings(group, device)
        subject = make(group, device, transport, options[cycle % len(options)], 256, 64)
        rng = random.Random(cycle % warm_up)
        how = draw(rng, cycle % warm_up, group.size())
        call = subject.checker.call(cycle, subject.checker.tokens(rng), how["fp8"])
        recv = round_trip(subject, call, how)
        if cycle % 3 == 0:
            subject.buf.destroy()
        call.check_received(recv, how["layout"], how["alignment"])  # outlives the Buffer
        raise_if_wrong([subject], {cycle: how})
        del subject, call, recv  # without destroy() the last reference does it
    return before, holdings(group, device)


@pytest.mark.parametrize(
    ("transport", "options", "usual", "full"),
    [
        ("nvlink", [SMALL, LARGE], 60, 200),
        ("nccl", [{"algorithm": "small"}], 10, 50),
        ("nccl", [{"algorithm": "window"}], 10, 50),
    ],
)
def test_buffers_leave_nothing(transport: str, options: Any, usual: int, full: int) -> None:
    size, count = ranks(), calls(usual, full)
    pool = launcher.pool("cuda")
    args = ("cuda", transport, options, count)
    for before, after in pool.run(size, run_cycles, *args, timeout=60.0 + 2.0 * count):
        assert abs(before[0] - after[0]) < MIB, (before, after)
        assert before[1:] == after[1:]


def run_killed(
    group: Any,
    parent: launcher.Parent,
    device: str,
    transport: str,
    options: dict[str, str],
    most: int,
) -> tuple[int, float, int]:
    """Calls until a rank is lost: which, when, and after how many calls that were right."""
    import epcomm

    subject = make(group, device, transport, options, 1024, most, LOST_TIMEOUT_S)
    rng = random.Random(11)
    for number in itertools.count():
        if number == 10:
            parent.tell("ready")
        how = draw(rng, number, group.size())
        try:
            call = subject.checker.call(number, subject.checker.tokens(rng), how["fp8"])
            round_trip(subject, call, how)
            if number % 10 == 9:
                wrong = subject.checker.wrong()
                subject.buf.check_faults()  # if a call was given up, what it left is not looked at
                assert not wrong, (wrong, how)
        except epcomm.PeerLost as lost:
            seen = time.monotonic()
            if device == "cuda":  # the context is usable
                assert torch.ones(8, device="cuda").sum().item() == 8
            return lost.rank, seen, number
    raise AssertionError("unreachable")


def check_killed(
    size: int, device: str, transport: str, options: dict[str, str], most: int, delay_s: float
) -> None:
    with launcher.spawn(
        size, run_killed, device, transport, options, most, device=device
    ) as processes:
        for r in range(size):
            assert processes.hear(r, 120.0) == "ready"
        time.sleep(delay_s)
        killed = time.monotonic()
        processes.kill(size - 1)
        for rank, seen, _ in processes.results(range(size - 1)):
            assert rank == size - 1
            assert seen - killed < LOST_TIMEOUT_S + 1.0


@pytest.mark.parametrize("delay_s", [0.0, 0.0471, 0.3])
@pytest.mark.parametrize(
    ("transport", "options", "most"),
    [("nvlink", LARGE, 600), ("nvlink", SMALL, 256), ("nccl", {}, 600), ("nccl", {}, 256)],
)
def test_killed_between_or_in_calls(
    transport: str, options: dict[str, str], most: int, delay_s: float
) -> None:
    check_killed(min(ranks(2), 4), "cuda", transport, options, most, delay_s)
