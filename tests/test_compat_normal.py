"""deep_ep's V1 Buffer, normal calls, against an oracle of its own."""

from typing import Any

import numpy as np
import pytest
import torch

import launcher
from deep_ep_oracle import World, gathered, payload, worlds

HIDDEN = 64


def same(actual: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    """Shape, dtype and ==."""
    assert actual.dtype == dtype, actual.dtype
    assert tuple(actual.shape) == expected.shape, (actual.shape, expected.shape)
    values = actual.float() if actual.dtype == torch.bfloat16 else actual
    np.testing.assert_array_equal(values.cpu().numpy(), expected)


def inputs(world: World, rank: int, seed: int = 0, device: str = "cpu") -> tuple[Any, ...]:
    xs = [payload(seed, r, len(world.idx[r]), HIDDEN) for r in range(world.num_ranks)]
    tensors = (xs[rank], world.idx[rank], world.weights[rank])
    x, idx, weights = (torch.from_numpy(array).to(device) for array in tensors)
    return xs, x.bfloat16(), idx, weights


def routed(buffer: Any, world: World, idx: torch.Tensor) -> dict[str, Any]:
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        idx, world.num_experts
    )
    assert event.event is None and per_node is None
    rank = buffer.rank
    same(per_rank, world.is_token_in_rank(rank).sum(0), torch.int32)
    same(per_expert, world.per_expert(rank), torch.int32)
    same(in_rank, world.is_token_in_rank(rank), torch.bool)
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_node,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }


def run_round(
    group: Any, tokens: list[int], alignment: int, async_finish: bool, device: str = "cpu"
) -> None:
    from epcomm.compat.deep_ep import Buffer, EventHandle, EventOverlap

    world = worlds(7, group.size(), tokens, 3, 4)
    rank = group.rank()
    xs, x, idx, weights = inputs(world, rank, device=device)
    buffer = Buffer(group, int(1e9), 0)
    layout = routed(buffer, world, idx)
    how: dict[str, Any] = {"async_finish": async_finish}
    if async_finish:
        how |= {"previous_event": Buffer.capture(), "allocate_on_comm_stream": True}
    else:
        how |= {"previous_event": EventOverlap(None)}

    def check_event(event: Any) -> None:
        assert isinstance(event, EventOverlap)
        assert isinstance(event.event, EventHandle if async_finish else type(None))
        event.current_stream_wait()

    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x, **layout, topk_idx=idx, topk_weights=weights, expert_alignment=alignment, **how
    )
    check_event(event)
    rows = world.rows(rank)
    same(recv_x, gathered(xs, rows), torch.bfloat16)
    ids, ws = world.recv_idx_weights(rank)
    same(recv_idx, ids, torch.int64)
    same(recv_weights, ws, torch.float32)
    assert counts == [-(-n // alignment) * alignment for n in world.counts(rank)]
    assert all(type(n) is int for n in counts)
    assert isinstance(handle, tuple)
    same(handle[0], world.rank_prefix_matrix(), torch.int32)

    # The same routing again: (recv_x, None, None, None, None, event).
    again = buffer.dispatch(x * 2, handle=handle, **how)
    check_event(again[5])
    same(again[0], 2 * gathered(xs, rows), torch.bfloat16)
    assert again[1:5] == (None,) * 4

    # Every rank returns its rank + 1 times the row.
    factor = torch.full((), rank + 1.0, dtype=torch.bfloat16, device=device)
    reached = np.array([sum(r + 1 for r in world.ranks(rank, t)) for t in range(len(idx))])
    expected = xs[rank] * reached.reshape(-1, 1)
    y, y_weights, event = buffer.combine(recv_x * factor, handle, **how)
    check_event(event)
    assert y_weights is None
    same(y, expected, torch.bfloat16)

    # Weights are summed per slot over ranks, also where a slot's expert is elsewhere.
    mine = torch.full_like(recv_weights, rank + 1.0)
    added = payload(3, rank, len(idx), HIDDEN)
    bias = torch.from_numpy(added).to(device).bfloat16()
    y, y_weights, event = buffer.combine(recv_x, handle, topk_weights=mine, bias=bias, **how)
    check_event(event)
    number = np.array([len(world.ranks(rank, t)) for t in range(len(idx))]).reshape(-1, 1)
    same(y, xs[rank] * number + added, torch.bfloat16)
    same(y_weights, np.repeat(reached.reshape(-1, 1), 3, 1).astype(np.float32), torch.float32)
    pair = (bias, bias + 1)
    y = buffer.combine(recv_x, handle, bias=pair)[0]
    same(y, xs[rank] * number + 2 * added + 1, torch.bfloat16)
    # A gradient of topk_weights comes back to its slot.
    y_weights = buffer.combine(recv_x, handle, topk_weights=recv_weights)[1]
    same(y_weights, np.where(world.idx[rank] >= 0, world.weights[rank], 0), torch.float32)
    # A tuple that is built again from the handle's items still is one.
    same(buffer.combine(recv_x * factor, tuple(handle))[0], expected, torch.bfloat16)


@pytest.mark.parametrize("async_finish", [False, True])
@pytest.mark.parametrize(
    ("ranks", "tokens", "alignment"),
    [(2, [5], 1), (3, [0, 9, 4], 128), (4, [3, 0], 8), (2, [0], 1)],
)
def test_round(ranks: int, tokens: list[int], alignment: int, async_finish: bool) -> None:
    launcher.pool().run(ranks, run_round, tokens, alignment, async_finish)


def run_fp8(group: Any, scale_dtype: torch.dtype, device: str = "cpu") -> None:
    from epcomm.compat.deep_ep import Buffer

    world = worlds(3, group.size(), [6, 0, 3], 2, 2)
    rank = group.rank()
    xs, x, idx, weights = inputs(world, rank, device=device)
    tables = [payload(9, r, len(world.idx[r]), 2).astype(np.int32) for r in range(world.num_ranks)]
    scales = torch.from_numpy(tables[rank]).to(device, scale_dtype)
    # Scales may have any strides.
    x = (x.to(torch.float8_e4m3fn), scales.t().contiguous().t())
    buffer = Buffer(group)
    layout = routed(buffer, world, idx)
    recv_x, *_, handle, _ = buffer.dispatch(x, **layout, topk_idx=idx, topk_weights=weights)
    assert isinstance(recv_x, tuple) and recv_x[0].dtype == torch.float8_e4m3fn
    rows = world.rows(rank)
    same(recv_x[0].bfloat16(), gathered(xs, rows), torch.bfloat16)
    same(recv_x[1], gathered(tables, rows), scale_dtype)
    again = buffer.dispatch(x, handle=handle)[0]
    assert torch.equal(again[1], recv_x[1])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32])
def test_fp8_pairs(scale_dtype: torch.dtype) -> None:
    launcher.pool().run(3, run_fp8, scale_dtype)


def run_without_topk(group: Any) -> None:
    from epcomm.compat.deep_ep import Buffer

    world = worlds(4, group.size(), [7, 2, 0], 3, 5)
    rank = group.rank()
    xs, x, idx, _ = inputs(world, rank)
    buffer = Buffer(group)
    layout = routed(buffer, world, idx)
    recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        x, **layout, expert_alignment=4
    )
    assert recv_idx is None and recv_weights is None
    same(recv_x, gathered(xs, world.rows(rank)), torch.bfloat16)
    assert counts == [-(-n // 4) * 4 for n in world.counts(rank)]
    same(handle[0], world.rank_prefix_matrix(), torch.int32)
    number = np.array([len(world.ranks(rank, t)) for t in range(len(idx))]).reshape(-1, 1)
    same(buffer.combine(recv_x, handle)[0], xs[rank] * number, torch.bfloat16)


def test_dispatch_without_topk() -> None:
    launcher.pool().run(3, run_without_topk)


def run_worst(group: Any, worst: int, device: str = "cpu") -> None:
    from epcomm.compat.deep_ep import Buffer

    world = worlds(5, group.size(), [4, 6], 2, 3)
    rank = group.rank()
    xs, x, idx, weights = inputs(world, rank, device=device)
    buffer = Buffer(group)
    layout = routed(buffer, world, idx)
    recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        x, **layout, topk_idx=idx, topk_weights=weights, num_worst_tokens=worst
    )
    rows = world.rows(rank)
    assert counts == []
    assert recv_x.shape == (worst, HIDDEN)
    assert recv_idx.shape == recv_weights.shape == (worst, 2)
    same(recv_x[: len(rows)], gathered(xs, rows), torch.bfloat16)
    ids, ws = world.recv_idx_weights(rank)
    same(recv_idx[: len(rows)], ids, torch.int64)
    same(recv_weights[: len(rows)], ws, torch.float32)
    assert bool((recv_idx[len(rows) :] == -1).all())
    recv_x = recv_x.clone()
    recv_x[len(rows) :] = float("nan")
    y, y_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    number = np.array([len(world.ranks(rank, t)) for t in range(len(idx))]).reshape(-1, 1)
    same(y, xs[rank] * number, torch.bfloat16)
    same(y_weights, np.where(world.idx[rank] >= 0, world.weights[rank], 0), torch.float32)
    assert buffer.dispatch(x, handle=handle)[0].shape == (worst, HIDDEN)


@pytest.mark.parametrize("worst", [18, 40, 41])
def test_num_worst_tokens(worst: int) -> None:
    launcher.pool().run(3, run_worst, worst)


def run_growth(group: Any, sizes: list[list[int]], device: str = "cpu") -> list[int]:
    """Batches that grow on one rank, on another, on all; handles of before stay good."""
    from epcomm.compat.deep_ep import Buffer

    rank = group.rank()
    buffer = Buffer(group)
    held = []
    for step, tokens in enumerate(sizes):
        world = worlds(step, group.size(), tokens, 2, 2)
        xs, x, idx, weights = inputs(world, rank, step, device)
        layout = dict(
            zip(("num_tokens_per_rank", "n", "num_tokens_per_expert", "is_token_in_rank"),
                buffer.get_dispatch_layout(idx, world.num_experts)[:4], strict=True)
        )  # fmt: skip
        layout.pop("n")
        recv_x, _, _, counts, handle, _ = buffer.dispatch(
            x, **layout, topk_idx=idx, topk_weights=weights
        )
        same(recv_x, gathered(xs, world.rows(rank)), torch.bfloat16)
        assert counts == world.counts(rank)
        held.append((recv_x, handle, world, xs[rank]))
        for old_x, old_handle, old_world, sent in held:
            y = buffer.combine(old_x, old_handle)[0]
            number = [len(old_world.ranks(rank, t)) for t in range(len(sent))]
            same(y, sent * np.array(number).reshape(-1, 1), torch.bfloat16)
    (left,) = buffer._pool._buffers.values()
    return [left.max_tokens]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([[3, 2, 1], [3, 300, 1], [5, 5, 5], [600, 600, 600], [0, 1, 1025]], 2048),
        ([[0, 0, 0], [256, 256, 256], [257, 1, 0]], 512),
    ],
)
def test_growth(sizes: list[list[int]], expected: int) -> None:
    assert launcher.pool().run(3, run_growth, sizes) == [[expected]] * 3


def run_misuse(group: Any) -> list[str]:
    from epcomm.compat.deep_ep import Buffer

    world = worlds(1, group.size(), [4], 2, 2)
    _, x, idx, weights = inputs(world, group.rank())
    buffer = Buffer(group)
    layout = routed(buffer, world, idx)
    recv_x, *_, handle, _ = buffer.dispatch(x, **layout, topk_idx=idx, topk_weights=weights)
    other = dict(layout, is_token_in_rank=~layout["is_token_in_rank"])
    calls = [
        lambda: buffer.dispatch(x, **layout, topk_idx=idx),
        lambda: buffer.dispatch(x, handle=handle, topk_idx=idx, topk_weights=weights),
        lambda: buffer.dispatch(x, topk_idx=idx, topk_weights=weights),
        lambda: buffer.dispatch(x, **other, topk_idx=idx, topk_weights=weights),
        lambda: buffer.dispatch(x, **layout, num_worst_tokens=8),
        lambda: buffer.dispatch(x, handle=handle, allocate_on_comm_stream=True),
        lambda: buffer.combine(recv_x, (torch.zeros(2),)),
        lambda: buffer.combine(recv_x[:-1], handle),
        lambda: Buffer(None),
        lambda: buffer.get_dispatch_layout(idx, world.num_experts + 1),
    ]
    told = []
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as raised:
            call()
        told.append(str(raised.value))
    with pytest.raises(AssertionError, match="explicitly_destroy"):
        buffer.destroy()
    return told


def test_misuse_names_the_argument() -> None:
    told = launcher.pool().run(2, run_misuse)[0]
    words = ["topk_weights", "handle", "num_tokens_per_expert", "is_token_in_rank"]
    words += ["num_worst_tokens", "allocate_on_comm_stream", "handle", "x has shape", "group"]
    words += ["num_experts"]
    assert len(told) == len(words)
    for text, word in zip(told, words, strict=True):
        assert word in text, (text, word)


def run_destroy(group: Any) -> None:
    import weakref

    import epcomm
    from epcomm.compat.deep_ep import Buffer

    world = worlds(1, group.size(), [4], 2, 2)
    _, x, idx, weights = inputs(world, group.rank())
    # As vLLM keeps them: by their arguments, weakly.
    arguments = {"group": group, "explicitly_destroy": True, "enable_shrink": False}
    cache: Any = weakref.WeakValueDictionary()
    buffer = cache[tuple(sorted(arguments.items()))] = Buffer(**arguments)
    assert list(cache.values()) == [buffer] and buffer.group == group
    layout = routed(buffer, world, idx)
    arguments = {**layout, "topk_idx": idx, "topk_weights": weights}
    recv_x, *_, handle, _ = buffer.dispatch(x, **arguments)
    before = recv_x.clone()
    buffer.destroy()
    assert torch.equal(before, recv_x)
    with pytest.raises(epcomm.BufferUnusable):
        buffer.dispatch(x, **arguments)
    with pytest.raises(epcomm.BufferUnusable):
        buffer.combine(recv_x, handle)


def test_destroy_is_local_and_final() -> None:
    launcher.pool().run(2, run_destroy)


class MpiComm:
    """The methods of mpi4py that are used, over a process group."""

    def __init__(self, group: Any):
        self.group = group

    def Get_rank(self) -> int:
        return int(self.group.rank())

    def Get_size(self) -> int:
        return int(self.group.size())

    def Allgather(self, mine: np.ndarray, all_of_them: np.ndarray) -> None:
        import torch.distributed as dist

        out = [torch.empty(len(mine), dtype=torch.uint8) for _ in range(self.Get_size())]
        dist.all_gather(out, torch.from_numpy(mine), group=self.group)
        all_of_them[:] = torch.stack(out).numpy()


def run_mpi(group: Any) -> None:
    from epcomm.compat.deep_ep import Buffer

    world = worlds(1, group.size(), [4], 2, 2)
    xs, x, idx, weights = inputs(world, group.rank())
    buffer = Buffer(None, comm=MpiComm(group))
    assert (buffer.rank, buffer.group_size) == (group.rank(), group.size())
    layout = routed(buffer, world, idx)
    recv_x = buffer.dispatch(x, **layout, topk_idx=idx, topk_weights=weights)[0]
    same(recv_x, gathered(xs, world.rows(group.rank())), torch.bfloat16)


def test_mpi_communicator() -> None:
    launcher.pool().run(2, run_mpi)
