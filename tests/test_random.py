"""Routings nobody thought of, and many calls in a row."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import launcher
from cases import CASES, FORMATS, Case
from checks import Layout
from launcher import TIMEOUT_S
from trial import Trial, buffer_arguments

LAYOUTS = st.one_of(
    st.just(Layout("token")),
    st.just(Layout("padded")),
    st.builds(Layout, st.just("expert"), st.integers(1, 9)),
)


@dataclass(frozen=True)
class Drawn:
    """A generated routing, as plain values that can be sent to the ranks."""

    idx: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][token][k]
    topk: int
    experts: int
    table: tuple[int, ...] | None
    layout: Layout
    fmt: str
    spare: int  # tokens of room left by the fullest rank
    ranks_per_node: int | None  # None: transport cpu, else hierarchical

    def way(self) -> dict[str, Any]:
        """How the rows go."""
        if self.ranks_per_node is None:
            return {"transport": "cpu"}
        options = {"chunk_tokens": 1 + self.spare}
        way: dict[str, Any] = {"transport": "hierarchical", "transport_options": options}
        return way | {"ranks_per_node": self.ranks_per_node}

    def case(self) -> Case:
        tokens = tuple(len(rows) for rows in self.idx)
        return Case(
            "drawn",
            tokens=tokens,
            routing=partial(_given, self.idx),
            experts=lambda ranks: self.experts,
            topk=lambda ranks: self.topk,
            buffer_topk=self.topk,
            max_tokens=max(1, max(tokens) + self.spare),
            table=lambda ranks: None if self.table is None else list(self.table),
            index_dtype=torch.int32 if self.spare % 2 else torch.int64,
            payload="random",
        )


def _given(idx: Any, rng: Any, rank: int, shape: tuple[int, int], experts: int) -> np.ndarray:
    return np.array(idx[rank], dtype=np.int64).reshape(shape)


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    ranks = draw(st.sampled_from([1, 2, 3, 4, 7]))
    experts = draw(st.integers(1, 3 * ranks))
    topk = draw(st.integers(1, 5))
    token = st.tuples(*[st.integers(-1, experts - 1)] * topk)
    rank = st.lists(token, max_size=6).map(tuple)
    table = st.tuples(*[st.integers(0, ranks - 1)] * experts)
    return Drawn(
        idx=tuple(draw(rank) for _ in range(ranks)),
        topk=topk,
        experts=experts,
        table=draw(st.none() | table),
        layout=draw(LAYOUTS),
        fmt=draw(st.sampled_from(sorted(FORMATS))),
        spare=draw(st.integers(0, 3)),
        ranks_per_node=draw(st.none() | st.integers(1, ranks)),
    )


def run_drawn(group: Any, d: Drawn) -> None:
    import epcomm

    case, fmt = d.case(), FORMATS[d.fmt]
    arguments = buffer_arguments(case, group.size(), fmt)
    with epcomm.Buffer(group, timeout=TIMEOUT_S, **d.way(), **arguments) as buf:
        Trial(buf, case, d.layout, fmt, ranks_per_node=d.ranks_per_node).run()


@settings(
    max_examples=320,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(drawn())
def test_any_routing(d: Drawn) -> None:
    launcher.pool().run(len(d.idx), run_drawn, d)


def run_numbers_of_tokens(group: Any, most: int) -> None:
    import epcomm

    fmt = FORMATS["fp16"]
    case = Case("ragged", max_tokens=most)
    arguments = buffer_arguments(case, group.size(), fmt)
    with epcomm.Buffer(group, transport="cpu", timeout=TIMEOUT_S, **arguments) as buf:
        for n in range(most + 1):
            case = Case(f"ragged-{n}", tokens=(n, most - n, 7 * n % (most + 1)), max_tokens=most)
            trial = Trial(buf, case, Layout("token"), fmt)
            trial.combine(trial.dispatch(n), n, weighted=True)


def test_every_number_of_tokens() -> None:
    launcher.pool().run(3, run_numbers_of_tokens, 257)


def run_large(group: Any, layout: Layout) -> None:
    import epcomm

    fmt = FORMATS["bf16"]
    case = Case(
        "large",
        tokens=(512, 509),
        experts=lambda ranks: 256,
        topk=lambda ranks: 8,
        max_tokens=512,
        units=7168 // fmt.hidden_per_unit,
    )
    arguments = buffer_arguments(case, group.size(), fmt)
    with epcomm.Buffer(group, transport="cpu", timeout=TIMEOUT_S, **arguments) as buf:
        trial = Trial(buf, case, layout, fmt)
        trial.combine(trial.dispatch(0), 0, weighted=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout("token"), Layout("expert", 128)], ids=lambda x: x.id)
def test_sizes_of_a_real_model(layout: Layout) -> None:
    launcher.pool().run(4, run_large, layout)


SOAK_CASES = ("uniform", "holes", "uneven_tokens", "duplicates", "every_second_rank_empty")
SOAK_LAYOUTS = (Layout("token"), Layout("expert", 8), Layout("padded"))


def run_soak(group: Any, num_calls: int) -> int:
    """Calls on four Buffers in one order that all ranks know: two on overlapping subgroups, two on
    the same group, one of them hierarchical. Some calls replay plans made long before; every call
    has its own payload."""
    import epcomm

    size, rank = group.size(), group.rank()
    evens = launcher.group_of(range(0, size, 2))
    low = launcher.group_of(range(size // 2 + 1))
    groups = [(range(size), group), (range(size), group)]
    groups += [(range(0, size, 2), evens), (range(size // 2 + 1), low)]
    fmt, trials, calls = FORMATS["bf16"], {}, 0
    buffers = []
    for which, (members, subgroup) in enumerate(groups):
        if rank not in members:
            continue
        arguments = buffer_arguments(CASES["uniform"], len(members), fmt)
        nodes = 3 if which == 1 else None
        way = "cpu" if nodes is None else "hierarchical"
        buf = epcomm.Buffer(
            subgroup, transport=way, ranks_per_node=nodes, timeout=TIMEOUT_S, **arguments
        )
        buffers.append(buf)
        trials[which] = [
            Trial(buf, CASES[name], layout, fmt, ranks_per_node=nodes)
            for name in SOAK_CASES
            for layout in SOAK_LAYOUTS
        ]
    rng = np.random.default_rng(17)
    recvs: dict[tuple[int, int], Any] = {}
    seen = set()
    for call in range(num_calls):
        # Drawn alike on all ranks, also by those that are not in this Buffer's group.
        which, index = int(rng.integers(len(groups))), int(rng.integers(15))
        action = rng.choice(["fresh", "replay", "combine", "weighted", "late"])
        first_time = (which, index) not in seen
        seen.add((which, index))
        if which not in trials:
            continue
        trial, at = trials[which][index], (which, index)
        if first_time or action in ("fresh", "late"):
            host_sync = action != "late"
            recvs[at] = trial.dispatch(call, host_sync=host_sync), host_sync
        elif action == "replay":
            recv, host_sync = recvs[at]
            recvs[at] = trial.dispatch(call, plan=recv.plan, host_sync=host_sync), host_sync
        else:
            recv, _ = recvs[at]
            trial.combine(recv, call, weighted=action == "weighted", out=call % 2 == 0)
        calls += 1
        if len(trial.held) > 12:
            trial.check_held()
            trial.held.clear()
    for some in trials.values():
        for trial in some:
            trial.check_held()
    for buf in buffers:
        buf.destroy()
    return calls


@pytest.mark.slow
def test_soak() -> None:
    pool = launcher.pool()
    calls = pool.run(pool.size, run_soak, 3000, timeout=300.0)
    assert min(calls) > 1000
