"""deep_ep's V1 Buffer, low-latency calls, against an oracle of its own."""

from typing import Any

import numpy as np
import pytest
import torch

import launcher
from deep_ep_oracle import World, gathered, payload, worlds
from test_compat_normal import same

HIDDEN, TOPK, LOCAL, MOST = 512, 3, 4, 7


def setup(group: Any, tokens: list[int], seed: int = 0, device: str = "cpu") -> tuple[Any, ...]:
    world = worlds(seed, group.size(), tokens, TOPK, LOCAL)
    rank = group.rank()
    xs = [payload(seed, r, len(world.idx[r]), HIDDEN) for r in range(world.num_ranks)]
    tensors = (xs[rank], world.idx[rank], world.weights[rank])
    x, idx, weights = (torch.from_numpy(array).to(device) for array in tensors)
    return world, xs, x.bfloat16(), idx, weights


def check_rows(
    recv_x: torch.Tensor, counts: torch.Tensor, world: World, xs: Any, rank: int
) -> None:
    assert recv_x.shape == (LOCAL, world.num_ranks * MOST, HIDDEN)
    assert recv_x.is_contiguous()
    same(counts, np.array(world.counts(rank)), torch.int32)
    for e in range(LOCAL):
        rows = world.expert_rows(rank, e)
        same(recv_x[e, : len(rows)], gathered(xs, rows), torch.bfloat16)


def outputs(recv_x: torch.Tensor, counts: torch.Tensor, rank: int) -> torch.Tensor:
    """What the experts give: e + 1 + 4 * rank times the row, NaN where there is none."""
    y = torch.full_like(recv_x, float("nan"))
    for e, n in enumerate(counts.tolist()):
        y[e, :n] = recv_x[e, :n] * (e + 1)
    return y


def combined(world: World, xs: Any, rank: int, lost: set[int] = frozenset()) -> np.ndarray:
    """Weighted sum of those outputs over the slots whose expert is not lost."""
    y = np.zeros_like(xs[rank])
    for t in range(len(y)):
        for k, e in enumerate(world.idx[rank][t].tolist()):
            if e >= 0 and e // LOCAL not in lost:
                y[t] += world.weights[rank][t, k] * (e % LOCAL + 1) * xs[rank][t]
    return y


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Partial sums and the sum are rounded to bf16."""
    assert actual.dtype == torch.bfloat16 and tuple(actual.shape) == expected.shape
    np.testing.assert_allclose(actual.float().cpu().numpy(), expected, rtol=2**-6, atol=2**-3)


def run_bf16(group: Any, tokens: list[int], how: dict[str, bool], device: str = "cpu") -> None:
    from epcomm.compat.deep_ep import Buffer

    world, xs, x, idx, weights = setup(group, tokens, device=device)
    rank = group.rank()
    buffer = Buffer(group, 0, 1 << 30, low_latency_mode=True, num_qps_per_rank=LOCAL)
    assert buffer.low_latency_mode and buffer.num_rdma_bytes == 1 << 30
    buffer.clean_low_latency_buffer(MOST, HIDDEN, world.num_experts)
    stats = torch.ones(LOCAL, dtype=torch.int32, device=device)
    recv_x, counts, handle, event, hook = buffer.low_latency_dispatch(
        x, idx, MOST, world.num_experts, stats, use_fp8=False, **how
    )
    assert (hook is None) == ("return_recv_hook" not in how)
    assert (event.event is None) == ("async_finish" not in how)
    if hook is not None:
        hook()
    event.current_stream_wait()
    check_rows(recv_x, counts, world, xs, rank)
    same(stats, 1 + np.array(world.counts(rank)), torch.int32)

    out = torch.full_like(x, float("nan"))
    y, event, hook = buffer.low_latency_combine(
        outputs(recv_x, counts, rank), idx, weights, handle, out=out, **how
    )
    assert (hook is None) == ("return_recv_hook" not in how)
    assert (event.event is None) == ("async_finish" not in how)
    if hook is not None:
        hook()
    event.current_stream_wait()
    assert y.data_ptr() == out.data_ptr()
    close(y, combined(world, xs, rank))
    # Through the buffer that deep_ep lends.
    lent = buffer.get_next_low_latency_combine_buffer(handle)
    assert lent.shape == recv_x.shape and lent.dtype == torch.bfloat16
    lent.copy_(outputs(recv_x, counts, rank))
    nan = torch.full_like(lent, float("nan"))
    again, _, _ = buffer.low_latency_combine(
        x=nan, topk_idx=idx.clone(), topk_weights=weights, handle=handle, zero_copy=True
    )
    assert torch.equal(again, y)
    # A slot that is left out of combine alone.
    fewer = idx.clone()
    fewer[:, 0] = -1
    y = buffer.low_latency_combine(outputs(recv_x, counts, rank), fewer, weights, handle)[0]
    fewer_idx = [*world.idx]
    fewer_idx[rank] = fewer.cpu().numpy()
    close(y, combined(World(world.num_experts, fewer_idx, world.weights), xs, rank))


@pytest.mark.parametrize("how", ["", "async_finish", "return_recv_hook"])
@pytest.mark.parametrize(("ranks", "tokens"), [(2, [7, 3]), (3, [0, 5, 7]), (4, [1])])
def test_bf16(ranks: int, tokens: list[int], how: str) -> None:
    launcher.pool().run(ranks, run_bf16, tokens, {how: True} if how else {})


def run_handle(group: Any, device: str = "cpu") -> None:
    from epcomm.compat.deep_ep import Buffer

    world, xs, x, idx, weights = setup(group, [7, 2, 4], seed=2, device=device)
    rank, size = group.rank(), group.size()
    buffer = Buffer(group, low_latency_mode=True)
    recv_x, counts, handle, _, _ = buffer.low_latency_dispatch(
        x, idx, MOST, world.num_experts, use_fp8=False
    )
    assert isinstance(handle, tuple) and len(handle) == 5
    src_info, layout_range, most, hidden, num_experts = handle
    assert (most, hidden, num_experts) == (MOST, HIDDEN, world.num_experts)
    assert src_info.shape == (LOCAL, size * MOST) and src_info.dtype == torch.int32
    assert layout_range.shape == (LOCAL, size) and layout_range.dtype == torch.int64
    for e in range(LOCAL):
        rows = world.expert_rows(rank, e)
        assert src_info[e, : len(rows)].tolist() == [t for _, t in rows]
        begin = 0
        for s in range(size):
            count = sum(source == s for source, _ in rows)
            word = int(layout_range[e, s])
            assert (word & 0xFFFFFFFF, word >> 32) == (count, begin)
            begin += count
    y = outputs(recv_x, counts, rank)
    close(buffer.low_latency_combine(y, idx, weights, handle)[0], combined(world, xs, rank))
    plain = (src_info, layout_range, most, hidden, num_experts)
    close(buffer.low_latency_combine(y, idx, weights, plain)[0], combined(world, xs, rank))


def test_handle() -> None:
    launcher.pool().run(3, run_handle)


def run_fp8(group: Any, kind: dict[str, bool], how: dict[str, bool], device: str = "cpu") -> None:
    from epcomm.compat.deep_ep import Buffer

    world, xs, _, idx, _ = setup(group, [6, 0, 7], seed=5, device=device)
    rank, size = group.rank(), group.size()
    rng = np.random.default_rng(1)
    # Blocks of very different magnitude, so that a wrong scale shows; values with 3 bits.
    magnitude = 2.0 ** rng.integers(-20, 20, HIDDEN // 128).repeat(128)
    xs = [(x * magnitude).astype(np.float32) for x in xs]
    x = torch.from_numpy(xs[rank]).to(device).bfloat16()
    buffer = Buffer(group, low_latency_mode=True)
    recv, _, _, event, hook = buffer.low_latency_dispatch(
        x, idx, MOST, world.num_experts, **kind, **how
    )
    if hook is not None:
        hook()
    event.current_stream_wait()
    q, scales = recv
    packed = "use_ue8m0" in kind
    rows, width = size * MOST, HIDDEN // (512 if packed else 128)
    assert q.shape == (LOCAL, rows, HIDDEN) and q.dtype == torch.float8_e4m3fn
    assert scales.shape == (LOCAL, rows, width)
    assert scales.dtype == (torch.int32 if packed else torch.float32)
    column = -(-rows // 4) * 4  # columns start on 16 bytes
    assert scales.stride() == (column * width, 1, column)
    values = scales.cpu().numpy()
    if packed:
        codes = np.ascontiguousarray(values).view(np.uint8).reshape(LOCAL, rows, HIDDEN // 128)
        values = 2.0 ** (codes.astype(np.float64) - 127)
    for e in range(LOCAL):
        named = world.expert_rows(rank, e)
        expected = gathered(xs, named).reshape(len(named), HIDDEN // 128, 128)
        got = q[e, : len(named)].float().cpu().numpy().reshape(expected.shape)
        scale = values[e, : len(named)]
        amax = np.abs(expected).max(axis=2)
        if kind:
            assert (np.exp2(np.round(np.log2(scale))) == scale).all()
            filled = amax > 0
            assert (amax[filled] <= 448 * scale[filled]).all()
            assert (amax[filled] > 224 * scale[filled]).all()
        np.testing.assert_allclose(got * scale[..., None], expected, rtol=2**-4, atol=0)


@pytest.mark.parametrize("how", [{}, {"async_finish": True}, {"return_recv_hook": True}])
@pytest.mark.parametrize(
    "kind", [{}, {"round_scale": True}, {"round_scale": True, "use_ue8m0": True}]
)
def test_fp8(kind: dict[str, bool], how: dict[str, bool]) -> None:
    launcher.pool().run(3, run_fp8, kind, how)


def run_refusals(group: Any) -> list[str]:
    from epcomm.compat.deep_ep import Buffer

    world, _, x, idx, weights = setup(group, [5])
    buffer = Buffer(group, low_latency_mode=True)
    most, experts = MOST, world.num_experts
    arguments = (x, idx, most, experts)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(*arguments, use_fp8=False)
    stats = torch.zeros(group.size(), dtype=torch.int64)
    told = []
    for error, call in (
        (
            NotImplementedError,
            lambda: buffer.low_latency_dispatch(*arguments, dispatch_wait_recv_cost_stats=stats),
        ),
        (
            NotImplementedError,
            lambda: buffer.low_latency_combine(
                recv_x, idx, weights, handle, combine_wait_recv_cost_stats=stats
            ),
        ),
        (
            NotImplementedError,
            lambda: buffer.low_latency_combine(recv_x, idx, weights, handle, use_logfmt=True),
        ),
        (ValueError, lambda: buffer.low_latency_dispatch(x, idx, 4, experts)),
        (ValueError, lambda: buffer.low_latency_dispatch(x, idx, most, experts + 1)),
        (
            ValueError,
            lambda: buffer.low_latency_dispatch(x[:, :64], idx, most, experts),
        ),
        (ValueError, lambda: buffer.low_latency_combine(recv_x, idx + 1, weights, handle)),
        (
            ValueError,
            lambda: buffer.low_latency_combine(recv_x, idx, weights, handle, zero_copy=True),
        ),
        (ValueError, lambda: buffer.low_latency_query_mask_buffer(stats.int())),
        (NotImplementedError, lambda: buffer.get_local_buffer_tensor(torch.int8, torch.Size([4]))),
        (NotImplementedError, buffer.get_comm_stream),
    ):
        with pytest.raises(error) as raised:
            call()
        told.append(str(raised.value))
    buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
    return told


def test_what_is_not_offered_is_named() -> None:
    told = launcher.pool().run(2, run_refusals)[0]
    words = ["dispatch_wait_recv_cost_stats", "combine_wait_recv_cost_stats", "use_logfmt"]
    words += ["num_max_dispatch_tokens_per_rank", "num_experts", "hidden", "topk_idx"]
    words += ["get_next_low_latency_combine_buffer", "enable_shrink", "get_local_buffer_tensor"]
    words += ["get_comm_stream"]
    for text, word in zip(told, words, strict=True):
        assert word in text, (text, word)


def run_both_modes(group: Any, device: str = "cpu") -> None:
    """One Buffer for both, as SGLang has it; results are kept as long as they are held."""
    from epcomm.compat.deep_ep import Buffer

    buffer = Buffer(group, 1 << 20, 1 << 20, low_latency_mode=True)
    held = []
    for step in range(4):
        world, xs, x, idx, weights = setup(group, [7, 2], seed=step, device=device)
        rank = group.rank()
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, world.num_experts)
        recv = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=idx,
            topk_weights=weights,
        )
        same(recv[0], gathered(xs, world.rows(rank)), torch.bfloat16)
        buffer.clean_low_latency_buffer(MOST, HIDDEN, world.num_experts)
        recv_x, counts, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, MOST, world.num_experts, use_fp8=False
        )
        held.append((recv_x, counts, handle, world, xs, idx, weights))
        for kept in held:
            check_rows(*kept[:2], *kept[3:5], rank)
            y = buffer.low_latency_combine(outputs(*kept[:2], rank), *kept[5:], kept[2])[0]
            close(y, combined(*kept[3:5], rank))


def test_both_modes_in_one_buffer() -> None:
    launcher.pool().run(2, run_both_modes)


LOST = 1


def run_shrink(group: Any, parent: Any) -> list[int]:
    import epcomm
    from epcomm.compat.deep_ep import Buffer

    rank = group.rank()
    buffer = Buffer(group, low_latency_mode=True, enable_shrink=True)
    mask = torch.full((group.size(),), 7, dtype=torch.int32)

    def step(seed: int, lost: set[int]) -> None:
        world, xs, x, idx, weights = setup(group, [7, 6, 5, 3], seed=seed)
        left = [i if r not in lost else np.full_like(i, -1) for r, i in enumerate(world.idx)]
        seen = World(world.num_experts, left, world.weights)
        recv_x, counts, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, MOST, world.num_experts, use_fp8=False
        )
        check_rows(recv_x, counts, seen, xs, rank)
        assert handle[0].shape == (LOCAL, group.size() * MOST)
        for e in range(LOCAL):
            rows = seen.expert_rows(rank, e)
            assert handle[0][e, : len(rows)].tolist() == [t for _, t in rows]
            sent = [sum(s == r for s, _ in rows) for r in range(group.size())]
            assert (handle[1][e] & 0xFFFFFFFF).tolist() == sent
        y = buffer.low_latency_combine(outputs(recv_x, counts, rank), idx, weights, handle)[0]
        close(y, combined(world, xs, rank, lost))

    step(1, set())
    buffer.low_latency_query_mask_buffer(mask)
    assert mask.tolist() == [0] * group.size()
    parent.tell("ready")
    parent.ask()
    if rank == LOST:
        return []
    with pytest.raises(epcomm.PeerLost) as lost:
        step(2, set())
    assert lost.value.rank == LOST
    buffer.low_latency_query_mask_buffer(mask)
    for seed in range(3, 6):
        step(seed, {LOST})
    return mask.tolist()


def test_survivors_go_on_without_a_lost_rank() -> None:
    with launcher.spawn(4, run_shrink, env={"EPCOMM_TIMEOUT": "20"}) as ranks:
        for rank in range(4):
            assert ranks.hear(rank) == "ready"
        ranks.kill(LOST)
        left = [r for r in range(4) if r != LOST]
        for rank in left:
            ranks.tell(rank)
        assert ranks.results(left) == [[0, 1, 0, 0]] * 3


def run_masks(group: Any) -> None:
    """A rank is left out for a while, by agreement; it takes no part meanwhile."""
    import torch.distributed as dist

    from epcomm.compat.deep_ep import Buffer

    rank = group.rank()
    buffer = Buffer(group, low_latency_mode=True, enable_shrink=True)
    with pytest.raises(ValueError, match="rank_to_mask"):
        buffer.low_latency_update_mask_buffer(rank, True)
    for turn, masked in enumerate([None, 0, None, 0, 2]):
        world, xs, x, idx, weights = setup(group, [5, 7, 1], seed=turn)
        lost = set() if masked is None else {masked}
        if rank not in lost:
            if masked is not None:
                buffer.low_latency_update_mask_buffer(masked, True)
            recv_x, counts, handle, _, _ = buffer.low_latency_dispatch(
                x, idx, MOST, world.num_experts, use_fp8=False
            )
            y = buffer.low_latency_combine(outputs(recv_x, counts, rank), idx, weights, handle)[0]
            close(y, combined(world, xs, rank, lost))
            mask = torch.zeros(3, dtype=torch.int32)
            buffer.low_latency_query_mask_buffer(mask)
            assert mask.nonzero().flatten().tolist() == sorted(lost)
            if turn % 2:
                buffer.low_latency_clean_mask_buffer()
            elif masked is not None:
                buffer.low_latency_update_mask_buffer(masked)
        dist.barrier(group=group)


def test_masks_by_agreement() -> None:
    launcher.pool().run(3, run_masks)


def run_late_losses(group: Any) -> list[int]:
    """A GPU call can return before it is known that it lost a peer; here a Buffer that says so."""
    import epcomm
    from epcomm.compat.deep_ep import Buffer

    class Losing:
        def check_faults(self) -> None:
            raise epcomm.PeerLost("lost", 2, "dispatch", 5)

    buffer = Buffer(group, low_latency_mode=True, enable_shrink=True)
    world, _, x, idx, _ = setup(group, [3])
    buffer.low_latency_dispatch(x, idx, MOST, world.num_experts, use_fp8=False)
    mask = torch.zeros(3, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(mask)
    assert not mask.any()
    buffers = buffer._pool._buffers
    (shape,) = buffers
    buffers[shape] = Losing()
    buffer.low_latency_query_mask_buffer(mask)
    assert not buffers
    return mask.tolist()


def test_query_sees_losses_of_calls_that_have_returned() -> None:
    assert launcher.pool().run(3, run_late_losses) == [[0, 0, 1]] * 3
