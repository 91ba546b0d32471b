"""The checks of tests/soak.py on the CPU transport, and that they see what is wrong."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import launcher
from simulated import needs_simulator
from soak import Checker, Placement, Shape
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


def _last_bit(tensor: torch.Tensor, rows: int = 1, row: int = 0) -> None:
    tensor.view(rows, -1)[row].view(torch.uint8)[-1] ^= 1


def _drop_row(recv: Any, at: Placement) -> Any:
    x, scales = recv.x
    ids = None if recv.topk_idx is None else recv.topk_idx[:-1]
    return replace(recv, x=(x[:-1], scales[:-1]), topk_idx=ids, topk_weights=recv.topk_weights[:-1])


def _swap_rows(recv: Any, at: Placement) -> None:
    rows = recv.x[0].view(torch.uint8).view(len(at.ids), -1)
    there = (at.ids >= 0).nonzero().flatten()
    rows[there] = rows[there.flip(0)]


def _row_fault(of: Callable[[Any], torch.Tensor]) -> Callable[[Any, Placement], None]:
    """The last bit of the last row that is there; behind it, and between groups, is padding."""
    return lambda recv, at: _last_bit(of(recv), len(at.ids), int((at.ids >= 0).nonzero()[-1]))


def _padding_id(recv: Any, at: Placement) -> None:
    recv.topk_idx[int((at.ids < 0).nonzero()[0])] = 0


FAULTS: dict[str, Callable[[Any, Placement], Any]] = {
    "x": _row_fault(lambda recv: recv.x[0]),
    "scales": _row_fault(lambda recv: recv.x[1]),
    "rows swapped": _swap_rows,
    "row missing": _drop_row,
    "topk_weights": _row_fault(lambda recv: recv.topk_weights),
    "topk_idx": _row_fault(lambda recv: recv.topk_idx),
    "topk_idx of padding": _padding_id,
    "tokens_per_expert": lambda recv, at: _last_bit(recv.tokens_per_expert),
    "num_tokens": lambda recv, at: _last_bit(recv.num_tokens),
}
LAYOUTS = ("token", "expert", "padded")
NOT_GIVEN = {  # what a layout has not
    ("padded", "topk_idx"),
    ("padded", "row missing"),
    ("padded", "topk_idx of padding"),
    ("token", "topk_idx of padding"),
}


def run_faults(group: Any, fault: str, layout: str) -> dict[int, int]:
    subject = make(group, "cpu", "cpu", {}, 256, 8)
    call = subject.checker.call(5, [8], fp8=True)
    batch = call.batch()
    alignment = 8 if fault == "topk_idx of padding" else 1
    recv = subject.buf.dispatch(
        batch.rows, batch.topk_idx, batch.topk_weights, layout=layout, expert_alignment=alignment
    )
    call.check_received(recv, layout, alignment)
    assert subject.checker.wrong() == {}
    at = call.placement(layout, alignment, recv.x[0].view(-1, 256).shape[0])
    call.check_received(FAULTS[fault](recv, at) or recv, layout, alignment)
    subject.buf.destroy()
    return subject.checker.wrong()


@pytest.mark.parametrize(
    ("layout", "fault"),
    [pair for pair in itertools.product(LAYOUTS, FAULTS) if pair not in NOT_GIVEN],
)
def test_wrong_is_counted(layout: str, fault: str) -> None:
    (wrong,) = launcher.pool().run(1, run_faults, fault, layout)
    assert list(wrong) == [5]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_wrong_sums_are_counted(layout: str, weighted: bool) -> None:
    checker = Checker(1, Shape(3, 10), "cpu")
    call = checker.call(7, [10, 6, 0])
    y = torch.zeros(6, 256, dtype=torch.bfloat16)
    call.check_combined(y, layout, weighted)
    assert checker.wrong()[7] > 6 * 128
