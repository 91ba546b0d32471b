"""Ranks that disagree: all of them raise the same ConfigMismatch, within seconds."""

import time
from typing import Any

import pytest
import torch

import launcher
from test_misuse import Setup

ODD = 1  # the rank that differs
NUM_RANKS = 3
# field, arguments of the odd rank, its value and that of the others as the message shows them
FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    ("hidden", {"hidden": 128}, "128", "64"),
    ("num_experts", {"num_experts": 7}, "7", "6"),
    ("topk", {"topk": 5}, "5", "4"),
    ("max_tokens", {"max_tokens": 9}, "9", "8"),
    ("dtype", {"dtype": torch.float32}, "float32", "bfloat16"),
    ("expert_to_rank", {"expert_to_rank": [0, 1, 2, 2, 1, 0]}, "table", "table"),
    ("ranks_per_node", {"ranks_per_node": 2}, "2", "0"),
    ("window_bytes", {"window_bytes": 1 << 26}, str(1 << 26), "0"),
    ("timeout", {"timeout": 7.0}, "7", "20"),
    ("transport_options", {"transport_options": {"a": 1}}, "a=1", ""),
]


def _told(call: Any) -> tuple[str, str, list[str], float]:
    import epcomm

    began = time.monotonic()
    try:
        call()
    except epcomm.ConfigMismatch as error:
        return str(error), error.field, list(error.value_per_rank), time.monotonic() - began
    raise AssertionError("the ranks did not notice")


def run_options(group: Any, changes: dict[str, Any]) -> Any:
    told = _told(lambda: Setup(group, **(changes if group.rank() == ODD else {})))
    Setup(group).buf.destroy()
    return told


def _check(told: list[Any], field: str, odd: str, usual: str) -> None:
    assert len({text for text, *_ in told}) == 1, told
    text, named, values, _ = told[0]
    assert field in named and field in text
    assert len(values) == NUM_RANKS
    assert odd in values[ODD]
    assert all(usual in v for r, v in enumerate(values) if r != ODD)
    assert values[ODD] not in [v for r, v in enumerate(values) if r != ODD]
    assert all(f"rank {r}" in text for r in range(NUM_RANKS)) or "ranks 0, 2" in text, text
    assert max(seconds for *_, seconds in told) < 5.0


@pytest.mark.parametrize(
    ("field", "changes", "odd", "usual"), [pytest.param(*f, id=f[0]) for f in FIELDS]
)
def test_options_differ(field: str, changes: dict[str, Any], odd: str, usual: str) -> None:
    _check(launcher.pool().run(NUM_RANKS, run_options, changes), field, odd, usual)


# field, the odd rank's call, its value, the others' value; the others make a plain dispatch.
CALLS = {
    "dtype": (lambda s: s.dispatch(x=s.x.half()), "float16", "bfloat16"),
    "layout": (lambda s: s.dispatch(layout="padded"), "padded", "token"),
    "expert_alignment": (lambda s: s.dispatch(expert_alignment=4), "4", "1"),
    "topk": (
        lambda s: s.dispatch(topk_idx=s.idx[:, :2].contiguous(), topk_weights=None),
        "2",
        "4",
    ),
    "topk_weights": (lambda s: s.dispatch(topk_weights=None), "not given", "given"),
    "operation": (lambda s: s.combine(), "combine", "route"),
}


def run_calls(group: Any, name: str) -> Any:
    setup = Setup(group)
    call = CALLS[name][0] if group.rank() == ODD else Setup.dispatch
    told = _told(lambda: call(setup))
    # Nothing was sent, and the ranks are still in step.
    recv = setup.dispatch()
    assert torch.equal(recv.x.float(), torch.ones_like(recv.x.float()))
    setup.buf.destroy()
    return told


@pytest.mark.parametrize("name", CALLS)
def test_calls_differ(name: str) -> None:
    told = launcher.pool().run(NUM_RANKS, run_calls, name)
    _check(told, name, *CALLS[name][1:])


def run_plans(group: Any, operation: str) -> Any:
    """All ranks replay, but not the same plan; the plans differ in where all tokens go."""
    setup = Setup(group)
    first = setup.dispatch(topk_idx=torch.zeros_like(setup.idx))
    second = setup.dispatch(topk_idx=torch.full_like(setup.idx, 5))
    mine = second if group.rank() == ODD else first
    if operation == "dispatch":
        told = _told(lambda: setup.replay(plan=mine.plan))
    else:
        told = _told(lambda: setup.combine(x=mine.x, plan=mine.plan))
    assert torch.equal(setup.combine(x=first.x, plan=first.plan), setup.x)
    setup.buf.destroy()
    return told


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_plans_differ(operation: str) -> None:
    told = launcher.pool().run(NUM_RANKS, run_plans, operation)
    # A fresh dispatch is two calls, route and dispatch; making the Setup has made one.
    _check(told, "plan", "epoch 5", "epoch 3")


def run_rows(group: Any) -> Any:
    """Rows of the layout and floats per slot, both of 16 bytes."""
    import epcomm

    with epcomm.Buffer(
        group, num_experts=6, hidden=4, topk=4, max_tokens=3, dtype=torch.float32, transport="cpu"
    ) as buf:
        recv = buf.dispatch(torch.ones(3, 4), torch.arange(12).view(3, 4) % 6)
        odd = group.rank() == ODD
        call = buf.combine_topk_weights if odd else buf.combine
        told = _told(lambda: call(recv.x, recv.plan))
        assert buf.combine(recv.x, recv.plan).shape == (3, 4)
    return told


def test_rows_differ() -> None:
    told = launcher.pool().run(NUM_RANKS, run_rows)
    _check(told, "rows", "one per token", "of the layout")


def run_versions(group: Any) -> Any:
    import epcomm

    class FromAnotherBuild(epcomm.TorchBootstrap):
        """Says what a rank with another version of epcomm would."""

        def all_gather(self, data: bytes) -> list[bytes]:
            mine = epcomm.__version__.encode()
            return super().all_gather(data.replace(mine, b"9.9.9".ljust(len(mine), b"0")))

    kind = FromAnotherBuild if group.rank() == ODD else epcomm.TorchBootstrap
    return _told(lambda: Setup(kind(group, 20.0)))


def test_versions_differ() -> None:
    import epcomm

    told = launcher.pool().run(NUM_RANKS, run_versions)
    _check(told, "version", "9.9.9", epcomm.__version__)
