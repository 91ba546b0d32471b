"""Rows and bytes per link, counted by the transport, against counts from the routing alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import launcher

EXPERTS_PER_RANK, TOPK, HIDDEN, TOKENS = 4, 4, 128, 37
LINKS = ("local", "node", "rail")


def _uniform(rng: np.random.Generator, ranks: int, ranks_per_node: int) -> np.ndarray:
    experts = EXPERTS_PER_RANK * ranks
    return np.stack([rng.permutation(experts)[:TOPK] for _ in range(TOKENS)])


def _skewed(rng: np.random.Generator, ranks: int, ranks_per_node: int) -> np.ndarray:
    """Most tokens want the first experts; some slots are empty, some experts named twice."""
    experts = EXPERTS_PER_RANK * ranks
    idx = np.minimum(rng.geometric(0.2, (TOKENS, TOPK)) - 1, experts - 1)
    idx[rng.random((TOKENS, TOPK)) < 0.2] = -1
    return idx


def _node_limited(rng: np.random.Generator, ranks: int, ranks_per_node: int) -> np.ndarray:
    """All experts of a token are on one node, drawn for each token."""
    idx = np.empty((TOKENS, TOPK), dtype=np.int64)
    for t in range(TOKENS):
        first = int(rng.integers(-(-ranks // ranks_per_node))) * ranks_per_node
        last = min(first + ranks_per_node, ranks)
        experts = np.arange(first * EXPERTS_PER_RANK, last * EXPERTS_PER_RANK)
        idx[t] = rng.permutation(experts)[:TOPK]
    return idx


ROUTINGS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "uniform": _uniform,
    "skewed": _skewed,
    "node_limited": _node_limited,
}


@dataclass
class Rows:
    """Rows that one rank sends, by link."""

    local: int = 0
    node: int = 0
    rail: int = 0

    def add(self, sender: int, receiver: int, ranks_per_node: int) -> None:
        if sender == receiver:
            self.local += 1
        elif sender // ranks_per_node == receiver // ranks_per_node:
            self.node += 1
        else:
            self.rail += 1


def expected(
    routing: str, ranks: int, ranks_per_node: int, forwards: bool
) -> tuple[list[Rows], list[Rows], list[np.ndarray]]:
    """Rows of dispatch and of combine by sender, and all ids. From sets of (token, rank, node)."""
    dispatch, combine = [Rows() for _ in range(ranks)], [Rows() for _ in range(ranks)]
    ids = []
    for source in range(ranks):
        rng = np.random.default_rng([source, ranks, ranks_per_node])
        ids.append(ROUTINGS[routing](rng, ranks, ranks_per_node))
        for token in ids[-1].tolist():
            wanted = {e // EXPERTS_PER_RANK for e in token if e >= 0}
            if not forwards:
                for r in wanted:
                    dispatch[source].add(source, r, ranks_per_node)
                    combine[r].add(r, source, ranks_per_node)
                continue
            for node in {r // ranks_per_node for r in wanted}:
                first = node * ranks_per_node
                size = min(ranks_per_node, ranks - first)
                agent = source
                if node != source // ranks_per_node:
                    agent = first + source % ranks_per_node % size
                    dispatch[source].add(source, agent, ranks_per_node)
                    combine[agent].add(agent, source, ranks_per_node)
                for r in wanted:
                    if r // ranks_per_node == node:
                        dispatch[agent].add(agent, r, ranks_per_node)
                        combine[r].add(r, agent, ranks_per_node)
    return dispatch, combine, ids


def check(traffic: Any, rows: Rows, row_bytes: int) -> None:
    for link in LINKS:
        counted = getattr(traffic, link)
        assert counted.rows == getattr(rows, link), (link, counted, rows)
        assert counted.bytes == counted.rows * row_bytes, (link, counted)


def run_counts(group: Any, transport: str, ranks_per_node: int, routing: str) -> Any:
    import epcomm

    ranks, rank = group.size(), group.rank()
    dispatch, combine, ids = expected(routing, ranks, ranks_per_node, transport != "cpu")
    with epcomm.Buffer(
        group,
        num_experts=EXPERTS_PER_RANK * ranks,
        hidden=HIDDEN,
        topk=TOPK,
        max_tokens=TOKENS,
        transport=transport,
        ranks_per_node=ranks_per_node,
        transport_options={"chunk_tokens": 5} if transport == "hierarchical" else None,
    ) as buf:
        nothing = buf.link_counters()
        assert all(sum(link) == 0 for operation in nothing for link in operation)
        x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
        q = (torch.zeros(TOKENS, HIDDEN, dtype=torch.uint8), torch.ones(TOKENS, 3))
        idx, weights = torch.from_numpy(ids[rank]), torch.ones(TOKENS, TOPK)
        recv = buf.dispatch(x, idx, weights)
        check(buf.link_counters().dispatch, dispatch[rank], 2 * HIDDEN)
        for link in buf.link_counters().dispatch:  # every row has its record
            assert link.meta_bytes >= link.rows * (3 * TOPK + 1) * 4
        buf.combine(recv.x, recv.plan, topk_weights=weights)
        check(buf.link_counters().combine, combine[rank], 2 * HIDDEN)

        # A replay sends the rows again, and counts add up until they are reset.
        buf.dispatch(x, plan=recv.plan)
        twice = buf.link_counters(reset=True)
        for link in LINKS:
            assert getattr(twice.dispatch, link).rows == 2 * getattr(dispatch[rank], link)
        buf.dispatch(q, plan=recv.plan)
        packed = buf.link_counters()
        check(packed.dispatch, dispatch[rank], HIDDEN + 12)
        assert all(sum(link) == 0 for link in packed.combine)
        # Without weights, sums travel alone.
        buf.combine(recv.x, recv.plan)
        assert all(link.meta_bytes == 0 for link in buf.link_counters().combine)
        assert buf.link_counters().combine.rail.rows == combine[rank].rail
    return twice.dispatch.rail.rows, twice.combine.rail.rows


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(4, 2), (6, 2), (5, 2), (7, 3), (4, 1)])
def test_rows_and_bytes_per_link(ranks: int, ranks_per_node: int, routing: str) -> None:
    pool = launcher.pool()
    rails = pool.run(ranks, run_counts, "hierarchical", ranks_per_node, routing)
    # One row per (token, remote node) there, and one back: counted once more, without senders.
    copies = 0
    for source in range(ranks):
        rng = np.random.default_rng([source, ranks, ranks_per_node])
        nodes = ROUTINGS[routing](rng, ranks, ranks_per_node) // EXPERTS_PER_RANK
        for token in nodes.tolist():
            copies += len(
                {r // ranks_per_node for r in token if r >= 0} - {source // ranks_per_node}
            )
    assert sum(out for out, _ in rails) == 2 * copies  # dispatched and replayed
    assert sum(back for _, back in rails) == copies
    if routing == "node_limited":
        assert copies <= ranks * TOKENS


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
def test_a_flat_transport_sends_one_row_per_rank(routing: str) -> None:
    launcher.pool().run(4, run_counts, "cpu", 2, routing)
