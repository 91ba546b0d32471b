"""Thousands of calls on GPU transports, each exact; late ranks; several graphs on one Buffer.

EPCOMM_TEST_CALLS says how many calls: a number, or `full` for what each test names beside its
usual number. tests/test_soak.py runs the same functions on the CPU.
"""

import random
import time
from typing import Any

import pytest
import torch

import launcher
from soak import Call, overwrite
from soak_calls import (
    CALLS_PER_WAIT,
    LARGE,
    LARGE_SHAPES,
    SMALL,
    SMALL_SHAPES,
    Subject,
    calls,
    draw,
    make,
    raise_if_wrong,
    ranks,
    round_trip,
    run_calls,
)

pytestmark = pytest.mark.gpu

CYCLES_PER_S = 1.7e9  # of a GPU, about


def check_calls(transport: str, options: dict[str, str], shapes: Any, count: int) -> None:
    size = ranks()
    args = ("cuda", transport, [options], shapes, count)
    done = launcher.pool("cuda").run(size, run_calls, *args, timeout=60.0 + 0.2 * count)
    assert done == [count] * size


def test_calls_of_large_batches() -> None:
    check_calls("nvlink", LARGE, LARGE_SHAPES, calls(3000, 20_000))


def test_calls_of_small_batches() -> None:
    check_calls("nvlink", SMALL, SMALL_SHAPES, calls(5000, 50_000))


def test_calls_of_nccl() -> None:
    check_calls("nccl", {}, LARGE_SHAPES[:2], calls(1000, 5000))


# Late ranks.


def late_trip(
    subject: Subject, call: Call, real: tuple[torch.Tensor, torch.Tensor], late: list[float]
) -> list[torch.Tensor]:
    """What a dispatch and a combine give, with seconds of delay before, between and inside."""
    buf, (x, weights) = subject.buf, real
    layout = ("token", "expert", "padded")[call.number % 3]
    time.sleep(late[0])
    idx = call.batch().topk_idx
    recv = buf.dispatch(x, idx, weights, layout=layout, host_sync=call.number % 2 == 0)
    if subject.device == "cuda":  # of the stream: the kernels of others wait, their hosts do not
        torch.cuda._sleep(int(late[1] * CYCLES_PER_S))
    out = buf.combine_input(recv.plan, torch.bfloat16).copy_(recv.x)
    time.sleep(late[2])
    y = buf.combine(out, recv.plan, topk_weights=weights)
    rows = recv.x.view(-1, recv.x.shape[-1])
    there = call.placement(layout, 1, len(rows)).ids >= 0
    return [y, torch.where(there[:, None], rows, 0.0)]


def run_late(
    group: Any, device: str, transport: str, options: dict[str, str], most: int, delay_s: float
) -> int:
    """Real numbers, whose sums depend on their order: late ranks must not change a bit."""
    subject = make(group, device, transport, options, 1024, most)
    rank, num_ranks = subject.buf.rank, subject.buf.num_ranks
    rng = torch.Generator().manual_seed(rank)
    compared = 0
    for number in range(6 * num_ranks):
        tokens = subject.checker.tokens(random.Random(number))
        call = subject.checker.call(number, tokens)
        x = torch.randn(tokens[rank], 1024, generator=rng).bfloat16().to(device)
        weights = torch.rand(tokens[rank], 4, generator=rng).to(device)
        expected = late_trip(subject, call, (x, weights), [0.0] * 3)
        # In turn each rank is late before the dispatch, on its stream, before the combine; others
        # a little, at random.
        draws = random.Random(1000 * number + rank)
        turn = (number + rank) % num_ranks
        late = [delay_s if turn == i else delay_s * draws.choice((0.0, 0.3)) for i in range(3)]
        for got, want in zip(late_trip(subject, call, (x, weights), late), expected, strict=True):
            assert torch.equal(got.view(torch.int16), want.view(torch.int16)), (number, late)
            compared += 1
    subject.buf.destroy()
    return compared


LATE = (("nvlink", LARGE, 600), ("nvlink", SMALL, 256), ("nccl", {}, 600))


@pytest.mark.parametrize(("transport", "options", "most"), LATE)
def test_late_ranks_change_no_bit(transport: str, options: dict[str, str], most: int) -> None:
    size = ranks(2)
    compared = launcher.pool("cuda").run(size, run_late, "cuda", transport, options, most, 0.1)
    assert min(compared) == 2 * 6 * size


# Several graphs on one Buffer.


class Step:
    """A dispatch and a combine on tensors of its own, as a CUDA graph; on the CPU as it is."""

    def __init__(self, subject: Subject, call: Call, layout: str, alignment: int):
        self.layout, self.alignment = layout, alignment
        # Batches to come are copied into this one, so nothing can be asked of its call any more.
        self._buf, self._batch = subject.buf, call.batch()
        self._out = self._buf.combine_input(self._dispatch().plan, torch.bfloat16)
        self._y = torch.empty_like(self._batch.x)
        self._recv = self._run()
        self._graph = None
        if subject.device == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._recv = self._run()

    def _dispatch(self) -> Any:
        return self._buf.dispatch(
            self._batch.x,
            self._batch.topk_idx,
            self._batch.topk_weights,
            layout=self.layout,
            expert_alignment=self.alignment,
            host_sync=False,
        )

    def _run(self) -> Any:
        recv = self._dispatch()
        self._buf.combine(self._out, recv.plan, topk_weights=self._batch.topk_weights, out=self._y)
        return recv

    def check(self, call: Call) -> None:
        """Runs with the rows and the routing of this call."""
        batch = call.batch()
        self._batch.x.copy_(batch.x)
        self._batch.topk_idx.copy_(batch.topk_idx)
        self._batch.topk_weights.copy_(batch.topk_weights)
        call.outputs(self.layout, self.alignment, self._out)
        self._y.fill_(float("nan"))
        if self._graph is None:
            self._recv = self._run()
        else:
            self._graph.replay()
        call.check_received(self._recv, self.layout, self.alignment)
        call.check_combined(self._y, self.layout, True)
        overwrite(self._recv)


def run_graphs(
    group: Any, device: str, transport: str, options: dict[str, str], most: int, count: int
) -> int:
    """Graphs of several sizes and layouts replayed in random order, with eager calls between."""
    subject = make(group, device, transport, options, 1024, most)
    checker, rng = subject.checker, random.Random(3)
    layouts = (("token", 1), ("expert", 8), ("padded", 1), ("token", 1))
    # The first is full; ranks differ by a few tokens.
    sizes = [
        [max((most >> way) - 3 * r % 5, 0) for r in range(group.size())]
        for way in range(len(layouts))
    ]
    steps = [
        Step(subject, checker.call(way, sizes[way]), *layouts[way]) for way in range(len(layouts))
    ]
    made: dict[int, Any] = {}
    for number in range(len(steps), len(steps) + count):
        way = rng.randrange(len(steps) + 1)
        if way == len(steps):
            made[number] = how = draw(rng, number, group.size())
            call = checker.call(number, checker.tokens(rng), how["fp8"])
            overwrite(round_trip(subject, call, how))
        else:
            made[number] = f"graph {way}, {layouts[way]}"
            steps[way].check(checker.call(number, sizes[way]))
        if number % CALLS_PER_WAIT == 0:
            raise_if_wrong([subject], made)
    raise_if_wrong([subject], made)
    steps.clear()
    subject.buf.destroy()
    return count


GRAPHS = (
    ("nvlink", LARGE, 600),
    ("nvlink", SMALL, 256),
    ("nccl", {"algorithm": "static"}, 64),
)


@pytest.mark.parametrize(("transport", "options", "most"), GRAPHS)
def test_several_graphs(transport: str, options: dict[str, str], most: int) -> None:
    size, count = ranks(), calls(500, 5000)
    args = ("cuda", transport, options, most, count)
    done = launcher.pool("cuda").run(size, run_graphs, *args, timeout=60.0 + 0.2 * count)
    assert done == [count] * size
