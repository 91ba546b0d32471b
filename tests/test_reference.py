"""The oracle against examples written by hand, and the checks against answers that are wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checks
import launcher
import reference
from cases import CASES, FORMATS
from checks import Layout

# Two ranks, experts 0, 1 on rank 0 and 2, 3 on rank 1.
OWNER = reference.owners(4, 2)
IDX = [np.array([[0, 1], [3, -1]]), np.array([[1, 2], [-1, -1], [2, 2]])]
WEIGHTS = [
    np.array([[0.5, 1.0], [2.0, 4.0]], dtype=np.float32),
    np.array([[1.0, 3.0], [8.0, 8.0], [0.25, 0.5]], dtype=np.float32),
]


def test_owners_split_contiguously_with_a_shorter_tail() -> None:
    assert reference.owners(10, 4).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert reference.owners(5, 4).tolist() == [0, 0, 1, 1, 2]
    assert reference.owners(3, 2, [1, 0, 1]).tolist() == [1, 0, 1]


def test_token_layout_by_hand() -> None:
    r = reference.dispatch(IDX, WEIGHTS, OWNER, 1, "token")
    assert list(zip(r.source, r.token, strict=True)) == [(0, 1), (1, 0), (1, 2)]
    assert r.topk_idx.tolist() == [[1, -1], [-1, 0], [0, 0]]
    assert r.topk_weights is not None
    assert r.topk_weights.tolist() == [[2.0, 0.0], [0.0, 3.0], [0.25, 0.5]]
    assert r.tokens_per_expert.tolist() == [2, 1]
    assert r.num_tokens == 3


def test_expert_layout_by_hand() -> None:
    r = reference.dispatch(IDX, WEIGHTS, OWNER, 0, "expert", 2)
    assert r.source.tolist() == [0, -1, 0, 1]
    assert r.token.tolist() == [0, -1, 0, 0]
    assert r.topk_idx.tolist() == [0, -1, 1, 1]
    assert r.topk_weights is not None and r.topk_weights.tolist() == [0.5, 0.0, 1.0, 1.0]
    assert r.expert_offsets is not None and r.expert_offsets.tolist() == [0, 2, 4]
    # A duplicate is one row; its weights are added.
    r = reference.dispatch(IDX, WEIGHTS, OWNER, 1, "expert", 1)
    assert list(zip(r.source, r.token, strict=True)) == [(1, 0), (1, 2), (0, 1)]
    assert r.topk_weights is not None and r.topk_weights.tolist() == [3.0, 0.75, 2.0]


def test_padded_layout_by_hand() -> None:
    r = reference.dispatch(IDX, None, OWNER, 1, "padded", 4)
    assert r.source.tolist() == [1, 1, -1, -1, 0, -1, -1, -1]
    assert r.tokens_per_expert.tolist() == [2, 1]
    assert r.topk_weights is None


def test_combine_by_hand() -> None:
    received = [reference.dispatch(IDX, WEIGHTS, OWNER, r, "expert", 1) for r in range(2)]
    rows = [np.array([[1.0], [10.0], [100.0]]), np.array([[2.0], [20.0], [200.0]])]
    rows = [r.astype(np.float32) for r in rows]

    def combine(source: int, **kwargs: np.ndarray) -> list[float]:
        y = reference.combine(
            rows, received, IDX[source], OWNER, source, reference.round_fp32, **kwargs
        )
        return y[:, 0].tolist()

    assert combine(0) == [1.0 + 10.0, 200.0]
    assert combine(1) == [100.0 + 2.0, 0.0, 20.0]
    assert combine(0, topk_weights=WEIGHTS[0]) == [0.5 + 10.0, 400.0]
    assert combine(1, topk_weights=WEIGHTS[1]) == [106.0, 0.0, 15.0]
    bias = np.array([[1000.0], [2000.0], [3000.0]], dtype=np.float32)
    assert combine(1, bias=bias) == [1102.0, 2000.0, 3020.0]


def test_partials_are_rounded_before_they_are_added() -> None:
    # 256 + 1 is a tie in bf16 and goes to the even 256; the two ones together would not be lost.
    idx, owner = [np.array([[0, 1, 2, 3]]), np.empty((0, 4), dtype=int)], OWNER
    received = [reference.dispatch(idx, None, owner, r, "expert", 1) for r in range(2)]
    rows = [
        np.array([[256.0], [1.0]], dtype=np.float32),
        np.array([[1.0], [0.0]], dtype=np.float32),
    ]
    y = reference.combine(rows, received, idx[0], owner, 0, reference.round_bf16)
    assert y.tolist() == [[256.0]]
    y = reference.combine(rows, received, idx[0], owner, 0, reference.round_fp32)
    assert y.tolist() == [[258.0]]


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.half)])
def test_rounding_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20000) * 10.0 ** rng.uniform(-9, 4, 20000)).astype(np.float32)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 0.0, -0.0])
    x = np.concatenate([x, ties.astype(np.float32)])
    assert np.array_equal(reference.ROUND[name](x), torch.from_numpy(x).to(dtype).float().numpy())


def _answer(layout: Layout) -> tuple[SimpleNamespace, reference.Received, list, checks.Routing]:
    """A right answer for rank 0 of 2, made from the oracle, ready to be spoiled."""
    case, fmt = CASES["uniform"], FORMATS["fp8"]
    routing = checks.routing_of(case, 2, layout)
    weights = [case.topk_weights(2, r) for r in range(2)]
    rows = [case.rows(fmt, 2, r) for r in range(2)]
    expected = routing.received(0, weights)
    valid = expected.source >= 0
    x = []
    for i in range(2):
        sent = torch.cat([rows[0][i], rows[1][i]])
        part = torch.zeros(len(valid), sent.shape[1]).to(sent.dtype)
        starts = np.array([0, len(rows[0][0])])
        at = starts[expected.source[valid]] + expected.token[valid]
        part.view(torch.uint8)[torch.from_numpy(valid)] = sent.view(torch.uint8)[at]
        if layout.name == "padded":
            part = part.view(len(expected.tokens_per_expert), -1, part.shape[1])
        x.append(part)
    topk_weights = torch.from_numpy(expected.topk_weights.copy())
    offsets = expected.expert_offsets
    # No token of this case names an expert twice.
    counts = np.stack([np.bincount(idx[idx >= 0], minlength=6) for idx in routing.topk_idx])
    ranks = np.stack(
        [
            [np.any(routing.owner[idx] == r, axis=1).sum() for r in range(2)]
            for idx in routing.topk_idx
        ]
    )
    plan = SimpleNamespace(
        tokens_per_expert=torch.from_numpy(expected.tokens_per_expert),
        expert_count=torch.from_numpy(counts.astype(np.int32)),
        rank_count=torch.from_numpy(ranks.astype(np.int32)),
        layout=layout.name,
        num_recv_tokens=expected.num_tokens,
        expert_offsets=None if offsets is None else torch.from_numpy(offsets),
    )
    recv = SimpleNamespace(
        x=tuple(x),
        topk_idx=None if layout.name == "padded" else torch.from_numpy(expected.topk_idx.copy()),
        topk_weights=topk_weights,
        tokens_per_expert=plan.tokens_per_expert.clone(),
        num_tokens=torch.tensor([expected.num_tokens], dtype=torch.int32),
        plan=plan,
    )
    return recv, expected, rows, routing


def _flip_bit_of_a_row(recv: SimpleNamespace) -> None:
    recv.x[0].view(torch.uint8).view(-1, recv.x[0].shape[-1])[1, 5] ^= 1


def _flip_bit_of_a_scale(recv: SimpleNamespace) -> None:
    recv.x[1].view(torch.uint8).view(-1)[0] ^= 1


def _swap_rows(recv: SimpleNamespace) -> None:
    recv.x[0].view(torch.uint8).view(-1, recv.x[0].shape[-1])[:2] = (
        recv.x[0].view(torch.uint8).view(-1, recv.x[0].shape[-1])[:2].flip(0).clone()
    )


def _lose_a_row(recv: SimpleNamespace) -> None:
    recv.x = tuple(part[:-1] for part in recv.x)


def _wrong_id(recv: SimpleNamespace) -> None:
    recv.topk_idx.view(-1)[0] += 1


def _wrong_weight(recv: SimpleNamespace) -> None:
    recv.topk_weights.view(-1)[-1] += 0.5


def _nan_weight(recv: SimpleNamespace) -> None:
    recv.topk_weights.view(-1)[0] = float("nan")


def _wrong_count(recv: SimpleNamespace) -> None:
    recv.tokens_per_expert[0] += 1


def _wrong_total(recv: SimpleNamespace) -> None:
    recv.num_tokens[0] -= 1


def _wrong_plan(recv: SimpleNamespace) -> None:
    recv.plan.num_recv_tokens -= 1


def _wrong_rank_count(recv: SimpleNamespace) -> None:
    recv.plan.rank_count[1, 0] += 1


def _wrong_expert_count(recv: SimpleNamespace) -> None:
    recv.plan.expert_count[0, -1] -= 1


SPOILS = [
    _flip_bit_of_a_row,
    _flip_bit_of_a_scale,
    _swap_rows,
    _lose_a_row,
    _wrong_id,
    _wrong_weight,
    _nan_weight,
    _wrong_count,
    _wrong_total,
    _wrong_plan,
    _wrong_rank_count,
    _wrong_expert_count,
]
LAYOUTS = [Layout("token"), Layout("expert", 8), Layout("padded")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.id)
def test_checks_accept_the_right_answer(layout: Layout) -> None:
    checks.check_received(*_answer(layout))


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__.strip("_"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.id)
def test_checks_refuse_a_wrong_answer(layout: Layout, spoil) -> None:
    if layout.name == "padded" and spoil is _wrong_id:
        pytest.skip("the padded layout has no ids")
    answer = _answer(layout)
    spoil(answer[0])
    with pytest.raises(AssertionError):
        checks.check_received(*answer)


def test_checks_refuse_a_wrong_or_unwritten_row_of_y() -> None:
    expected = np.arange(12, dtype=np.float32).reshape(3, 4)
    y = torch.from_numpy(expected.copy()).to(torch.bfloat16)
    checks.equal(y, expected, "y")
    y[1, 2] += 1
    with pytest.raises(AssertionError, match="y: 1 of 12 values are wrong"):
        checks.equal(y, expected, "y")
    y[1] = float("nan")
    with pytest.raises(AssertionError, match="y: 4 of 12"):
        checks.equal(y, expected, "y")


def _fail_on_rank_1(group) -> None:
    if group.rank() == 1:
        raise ValueError("deliberate")


def _end_rank_1(group) -> None:
    import os

    if group.rank() == 1:
        os._exit(3)


def _stall(group) -> None:
    import time

    time.sleep(30)


@pytest.mark.parametrize(
    ("fn", "rank", "text"),
    [(_fail_on_rank_1, 1, "deliberate"), (_end_rank_1, 1, "exit code 3"), (_stall, 0, "no answer")],
)
def test_launcher_reports_the_rank_that_failed(fn, rank: int, text: str) -> None:
    pool = launcher.Pool("cpu")
    pool.size = 2
    with pytest.raises(launcher.RankFailed, match=text) as failed:
        pool.run(2, fn, timeout=2.0)
    assert failed.value.rank == rank
    pool.kill()
