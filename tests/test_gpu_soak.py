"""Thousands of calls on GPU transports, each exact; late ranks; several graphs on one Buffer.

EPCOMM_TEST_CALLS says how many calls: a number, or `full` for what each test names beside its
usual number. tests/test_soak.py runs the same functions on the CPU.
"""

import itertools
import random
import time
from typing import Any

import pytest
import torch

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
    pool = ranks()
    args = ("cuda", transport, [options], shapes, count)
    done = pool.run(pool.size, run_calls, *args, timeout=60.0 + 0.2 * count)
    assert done == [count] * pool.size


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
    pool = ranks(2)
    compared = pool.run(pool.size, run_late, "cuda", transport, options, most, 0.1)
    assert min(compared) == 2 * 6 * pool.size


# Several graphs on one Buffer.


def run_graphs(group: Any, transport: str, options: dict[str, str], most: int, count: int) -> int:
    """Graphs of several sizes and layouts replayed in random order, with eager calls between."""
    subject = make(group, "cuda", transport, options, 1024, most)
    buf, checker = subject.buf, subject.checker
    rng = random.Random(3)
    numbers = itertools.count()
    ways = (("token", 1), ("expert", 8), ("padded", 1), ("token", 1))

    def sizes(way: int) -> list[int]:
        return [(most >> way) - 3 * r % 5 for r in range(buf.num_ranks)]

    def captured(way: int) -> tuple[Any, ...]:
        layout, alignment = ways[way]
        first = checker.call(next(numbers), sizes(way)).batch()
        out = buf.combine_input(
            buf.dispatch(
                first.x,
                first.topk_idx,
                first.topk_weights,
                layout=layout,
                expert_alignment=alignment,
                host_sync=False,
            ).plan,
            torch.bfloat16,
        )
        y = torch.empty_like(first.x)

        def step() -> Any:
            recv = buf.dispatch(
                first.x,
                first.topk_idx,
                first.topk_weights,
                layout=layout,
                expert_alignment=alignment,
                host_sync=False,
            )
            buf.combine(out, recv.plan, topk_weights=first.topk_weights, out=y)
            return recv

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recv = step()
        return graph, first, out, y, recv

    graphs = [captured(way) for way in range(len(ways))]
    made: dict[int, Any] = {}
    for _ in range(count):
        way = rng.randrange(len(ways) + 1)
        number = next(numbers)
        if way == len(ways):
            made[number] = how = draw(rng, number)
            call = checker.call(number, checker.tokens(rng), how["fp8"])
            overwrite(round_trip(subject, call, how))
        else:
            made[number] = f"graph {way}, {ways[way]}"
            call = checker.call(number, sizes(way))
            graph, static, out, y, recv = graphs[way]
            batch = call.batch()
            static.x.copy_(batch.x)
            static.topk_idx.copy_(batch.topk_idx)
            static.topk_weights.copy_(batch.topk_weights)
            call.outputs(*ways[way], out)
            y.fill_(float("nan"))
            graph.replay()
            call.check_received(recv, *ways[way])
            call.check_combined(y, ways[way][0], True)
            overwrite(recv)
        if number % CALLS_PER_WAIT == 0:
            raise_if_wrong([subject], made)
    raise_if_wrong([subject], made)
    torch.cuda.synchronize()
    del graphs
    buf.destroy()
    return count


GRAPHS = (
    ("nvlink", LARGE, 600),
    ("nvlink", SMALL, 256),
    ("nccl", {"algorithm": "static"}, 64),
)


@pytest.mark.parametrize(("transport", "options", "most"), GRAPHS)
def test_several_graphs(transport: str, options: dict[str, str], most: int) -> None:
    pool, count = ranks(), calls(500, 5000)
    args = (transport, options, most, count)
    done = pool.run(pool.size, run_graphs, *args, timeout=60.0 + 0.2 * count)
    assert done == [count] * pool.size
