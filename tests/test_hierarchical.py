"""What only a transport that forwards has: order of sums, staging memory, options."""

from typing import Any

import numpy as np
import pytest
import torch

import launcher
import test_misuse
from test_faults import Setup, fault

HIDDEN = 16


def run_order_of_sums(
    group: Any, ranks_per_node: int, values: list[float], expected: float
) -> list[bytes]:
    """Every token goes to every rank, and rank r answers values[r]."""
    import epcomm

    ranks, seen = group.size(), []
    for chunk_tokens in (1, 2, 64):
        with epcomm.Buffer(
            group,
            num_experts=ranks,
            hidden=HIDDEN,
            topk=ranks,
            max_tokens=5,
            dtype=torch.float32,
            transport="hierarchical",
            ranks_per_node=ranks_per_node,
            transport_options={"chunk_tokens": chunk_tokens},
        ) as buf:
            x = torch.zeros(5, HIDDEN)
            recv = buf.dispatch(x, torch.arange(ranks).repeat(5, 1))
            out = torch.full_like(recv.x, values[group.rank()])
            for _ in range(3):
                y = buf.combine(out, recv.plan)
                assert torch.equal(y, torch.full_like(y, expected)), (chunk_tokens, y[0, 0])
                seen.append(y.numpy().tobytes())
    assert len(set(seen)) == 1
    return seen


BIG = 2.0**24  # adding 1 to it gives the same fp32 number
# ranks_per_node, what each rank answers, what comes of it. Other orders give something else: 1
# instead of 0 where the 1 is added last, and 0 instead of 1 where nothing is added up in a node.
ORDERS = [
    pytest.param(3, [BIG, 1, -BIG, 0, 0, 0], 0.0, id="ranks_of_a_node_ascending"),
    pytest.param(2, [BIG, 0, 1, 0, -BIG, 0], 0.0, id="nodes_ascending"),
    pytest.param(3, [1, 0, 0, BIG, 1, -BIG], 1.0, id="each_node_first"),
]


@pytest.mark.parametrize(("ranks_per_node", "values", "expected"), ORDERS)
def test_order_of_sums(ranks_per_node: int, values: list[float], expected: float) -> None:
    launcher.pool().run(len(values), run_order_of_sums, ranks_per_node, values, expected)


def run_node_sum_is_rounded(group: Any) -> None:
    """bf16: 256 + 1 is 256, in a node and before it leaves the node; in one fp32 sum it is not."""
    import epcomm

    values = [256.0, 1.0, 1.0, 1.0]
    results = {}
    for transport in ("cpu", "hierarchical"):
        with epcomm.Buffer(
            group,
            num_experts=4,
            hidden=HIDDEN,
            topk=4,
            max_tokens=3,
            transport=transport,
            ranks_per_node=2,
        ) as buf:
            x = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
            recv = buf.dispatch(x, torch.arange(4).repeat(3, 1))
            y = buf.combine(torch.full_like(recv.x, values[group.rank()]), recv.plan)
            bias = torch.full_like(y, 0.5)
            biased = buf.combine(
                torch.full_like(recv.x, values[group.rank()]), recv.plan, bias=bias
            )
            results[transport] = sorted({*y.flatten().tolist(), *biased.flatten().tolist()})
    # Node 0: 257 is half-way between 256 and 258, to even: 256. Node 1: 2. Their sum is 258.
    assert results["hierarchical"] == [258.0]
    # Flat: 259 is half-way between 258 and 260, to even: 260.
    assert results["cpu"] == [260.0]


def test_node_sum_is_rounded() -> None:
    launcher.pool().run(4, run_node_sum_is_rounded)


def run_options(group: Any) -> list[str]:
    texts = []
    for options in ({"chunk_tokens": 0}, {"chunk_tokens": "many"}, {"chunks": 3}):
        with pytest.raises(ValueError) as error:
            test_misuse.Setup(group, transport="hierarchical", transport_options=options)
        texts.append(str(error.value))
    for ranks_per_node in (0, -1, 2.5, True):
        with pytest.raises((ValueError, TypeError)) as wrong:
            test_misuse.Setup(group, ranks_per_node=ranks_per_node)
        texts.append(str(wrong.value))
    test_misuse.Setup(group, ranks_per_node=1000).buf.destroy()  # one node
    return texts


def test_options_are_checked() -> None:
    for texts in launcher.pool().run(2, run_options):
        for text, words in zip(
            texts,
            (("chunk_tokens", "0"), ("chunk_tokens", "many"), ("chunks", "chunk_tokens")),
            strict=False,
        ):
            assert all(word in text for word in words), text
        for text in texts[3:]:
            assert "ranks_per_node" in text


def run_staging_full(group: Any) -> dict[str, Any]:
    """Rank 2 keeps no row, but forwards all rows of rank 0 to rank 3: its window is full first."""
    setup = Setup(
        group,
        hidden=1024,
        max_tokens=1024,
        window_bytes=4 << 20,
        transport="hierarchical",
        ranks_per_node=2,
    )
    tokens = 1024 if group.rank() == 0 else 0
    kept = torch.zeros(tokens, 1024, dtype=torch.bfloat16)
    idx = torch.full((tokens, 1), 7)
    held = None
    if group.rank() == 2:
        held = setup.buf._native.allocate(3 << 20)
        assert held is not None
    told = fault(lambda: setup.buf.dispatch(kept, idx))
    del held
    recv = setup.buf.dispatch(kept, idx)  # the Buffer is usable, and now there is room
    assert len(recv.x) == (1024 if group.rank() == 3 else 0)
    setup.buf.destroy()
    return told


def test_staging_that_does_not_fit() -> None:
    for told in launcher.pool().run(4, run_staging_full):
        assert told["type"] == "WindowFull", told
        assert told["rank"] == 2 and told["needed_bytes"] >= 1024 * 2048, told
        assert told["needed_bytes"] > told["free_bytes"]


def run_one_node_is_flat(group: Any) -> None:
    """Without bias, one node gives the bits of the flat transport; so do nodes of one rank."""
    import epcomm

    rng = np.random.default_rng(5 + group.rank())
    x = torch.from_numpy(rng.standard_normal((9, HIDDEN), dtype=np.float32)).bfloat16()
    idx = torch.from_numpy(rng.integers(-1, 8, (9, 4)))
    outputs = []
    for transport, ranks_per_node in (("cpu", None), ("hierarchical", None), ("hierarchical", 1)):
        with epcomm.Buffer(
            group,
            num_experts=8,
            hidden=HIDDEN,
            topk=4,
            max_tokens=9,
            transport=transport,
            ranks_per_node=ranks_per_node,
        ) as buf:
            recv = buf.dispatch(x, idx)
            outputs.append(buf.combine(recv.x, recv.plan))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_one_node_and_nodes_of_one_rank_are_flat() -> None:
    launcher.pool().run(4, run_one_node_is_flat)
