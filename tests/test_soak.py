"""The checks of tests/soak.py on the CPU transport, and that they see what is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import launcher
from simulated import needs_simulator
from soak import Checker, Shape
from soak_calls import LARGE, SMALL, make, run_calls
from test_gpu_lifetime import check_killed, run_cycles
from test_gpu_soak import run_graphs, run_late


def test_calls() -> None:
    shapes = ((256, 40), (1040, 17))
    done = launcher.pool().run(3, run_calls, "cpu", "cpu", [{}], shapes, 200)
    assert done == [200] * 3


def test_late_ranks() -> None:
    compared = launcher.pool().run(2, run_late, "cpu", "cpu", {}, 20, 0.01)
    assert compared == [24, 24]


def test_several_steps() -> None:
    assert launcher.pool().run(3, run_graphs, "cpu", "cpu", {}, 40, 60) == [60] * 3


def test_cycles() -> None:
    for before, after in launcher.pool().run(2, run_cycles, "cpu", "cpu", [{}], 10):
        assert before == after


@pytest.mark.parametrize("delay_s", [0.0, 0.0271])
def test_killed(delay_s: float) -> None:
    check_killed(3, "cpu", "cpu", {}, 40, delay_s)


@needs_simulator
@pytest.mark.parametrize("options", [LARGE, SMALL], ids=["large", "small"])
def test_simulated(options: dict[str, str]) -> None:
    shapes = ((256, 20), (1040, 9))
    pool = launcher.pool("simulated")
    assert pool.run(3, run_calls, "cpu", "nvlink", [options], shapes, 40, timeout=300.0) == [40] * 3
    assert pool.run(2, run_late, "cpu", "nvlink", options, 12, 0.01, timeout=300.0) == [24] * 2


@needs_simulator
def test_simulated_nodes() -> None:
    pool = launcher.pool("simulated")
    shapes, chunks = ((256, 20), (1040, 9)), [{"chunk_tokens": 1}, {"chunk_tokens": 7}]
    assert pool.run(3, run_calls, "cpu", "rdma", [{}], shapes, 40, timeout=300.0) == [40] * 3
    args = ("cpu", "hierarchical", chunks, shapes, 40, 0, 2)
    assert pool.run(4, run_calls, *args, timeout=300.0) == [40] * 4


def _last_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.uint8).view(-1)[-1] ^= 1


FAULTS: dict[str, Callable[[Any], None]] = {
    "x": lambda recv: _last_bit(recv.x[0]),
    "scales": lambda recv: _last_bit(recv.x[1]),
    "rows swapped": lambda recv: (
        recv.x[0].view(torch.uint8).copy_(recv.x[0].view(torch.uint8).flip(-2))
    ),
    "topk_weights": lambda recv: _last_bit(recv.topk_weights),
    "topk_idx": lambda recv: _last_bit(recv.topk_idx),
    "tokens_per_expert": lambda recv: _last_bit(recv.tokens_per_expert),
    "num_tokens": lambda recv: _last_bit(recv.num_tokens),
}


def run_faults(group: Any, fault: str, layout: str) -> dict[int, int]:
    subject = make(group, "cpu", "cpu", {}, 256, 8)
    call = subject.checker.call(5, [8], fp8=True)
    batch = call.batch()
    recv = subject.buf.dispatch(batch.rows, batch.topk_idx, batch.topk_weights, layout=layout)
    call.check_received(recv, layout)
    assert subject.checker.wrong() == {}
    FAULTS[fault](recv)
    call.check_received(recv, layout)
    subject.buf.destroy()
    return subject.checker.wrong()


@pytest.mark.parametrize("layout", ["token", "expert"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_is_counted(fault: str, layout: str) -> None:
    (wrong,) = launcher.pool().run(1, run_faults, fault, layout)
    assert list(wrong) == [5]


@pytest.mark.parametrize("layout", ["token", "expert", "padded"])
@pytest.mark.parametrize("weighted", [False, True])
def test_wrong_sums_are_counted(layout: str, weighted: bool) -> None:
    checker = Checker(1, Shape(3, 10), "cpu")
    call = checker.call(7, [10, 6, 0])
    y = torch.zeros(6, 256, dtype=torch.bfloat16)
    call.check_combined(y, layout, weighted)
    assert checker.wrong()[7] > 6 * 128
