"""deep_ep's V2 ElasticBuffer against an oracle of its own."""

from typing import Any

import numpy as np
import pytest
import torch

import launcher
from deep_ep_oracle import World, gathered, payload, worlds
from test_compat_normal import inputs, same

TOPK, LOCAL, HIDDEN, MOST = 3, 4, 64, 10


def aligned(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def expanded(world: World, rank: int, alignment: int) -> tuple[list[Any], list[int]]:
    """Rows of the expanded layout, None = padding, and where each expert's rows begin."""
    rows: list[Any] = []
    begins = []
    for e in range(world.local_experts):
        begins.append(len(rows))
        rows += world.expert_rows(rank, e)
        rows += [None] * (aligned(len(rows), alignment) - len(rows))
    return rows, begins


def check_handle(handle: Any, world: World, rank: int, alignment: int, synced: bool) -> None:
    counts = world.counts(rank)
    rows = world.rows(rank)
    assert handle.num_experts == world.num_experts and handle.expert_alignment == alignment
    assert handle.num_max_tokens_per_rank == MOST
    assert isinstance(handle.num_sms, int) and handle.num_sms > 0
    np.testing.assert_array_equal(handle.topk_idx.cpu().numpy(), world.idx[rank])
    sources = np.cumsum([sum(s == r for s, _ in rows) for r in range(world.num_ranks)])
    same(handle.psum_num_recv_tokens_per_scaleup_rank, sources, torch.int32)
    same(handle.num_unaligned_recv_tokens_per_expert, np.array(counts), torch.int32)
    room = [aligned(n, alignment) for n in counts]
    ends = np.cumsum(room)
    if handle.do_expand:
        ends = ends - room + np.array(counts)
    same(handle.psum_num_recv_tokens_per_expert, ends, torch.int32)
    assert handle.num_recv_tokens_per_expert_list == (room if synced else [])
    if synced:
        assert handle.num_recv_tokens == len(rows)
        assert handle.num_expanded_tokens == (sum(room) if handle.do_expand else len(rows))
    metadata = handle.recv_src_metadata[: len(rows)].tolist()
    assert [(source, token) for token, source, *_ in metadata] == rows


def run_tokens(group: Any, synced: bool, alignment: int, device: str = "cpu") -> None:
    from epcomm.compat.deep_ep import ElasticBuffer, EPHandle, EventHandle, EventOverlap

    world = worlds(11, group.size(), [6, 0, 10], TOPK, LOCAL)
    rank, size = group.rank(), group.size()
    xs, x, idx, weights = inputs(world, rank, device=device)
    buffer = ElasticBuffer(
        group, num_max_tokens_per_rank=MOST, hidden=HIDDEN, num_topk=TOPK, deterministic=True
    )
    assert buffer.num_bytes > 0 and buffer.num_max_tokens_per_rank == MOST
    rows = world.rows(rank)
    stats = torch.zeros(LOCAL, dtype=torch.int32, device=device)
    recv_x, recv_idx, recv_weights, handle, event = buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        cumulative_local_expert_recv_stats=stats,
        num_experts=world.num_experts,
        expert_alignment=alignment,
        do_cpu_sync=synced,
    )
    assert isinstance(event, EventOverlap) and event.event is None
    assert isinstance(handle, EPHandle) and not handle.do_expand
    check_handle(handle, world, rank, alignment, synced)
    same(stats, np.array(world.counts(rank)), torch.int32)
    n = len(rows) if synced else size * MOST
    assert recv_x.shape == (n, HIDDEN) and recv_idx.shape == recv_weights.shape == (n, TOPK)
    same(recv_x[: len(rows)], gathered(xs, rows), torch.bfloat16)
    ids, ws = world.recv_idx_weights(rank)
    same(recv_idx[: len(rows)], ids, torch.int64)
    same(recv_weights[: len(rows)], ws, torch.float32)

    again, again_idx, no_weights, again_handle, event = buffer.dispatch(
        x * 2,
        handle=handle,
        num_sms=handle.num_sms,
        do_cpu_sync=False,
        previous_event=ElasticBuffer.capture(),
        async_with_compute_stream=True,
    )
    assert isinstance(event.event, EventHandle) and again_handle is handle
    with event:
        pass
    assert no_weights is None
    same(again[: len(rows)], 2 * gathered(xs, rows), torch.bfloat16)
    same(again_idx[: len(rows)], ids, torch.int64)

    recv_x = recv_x.clone()
    recv_x[len(rows) :] = float("nan")
    bias = torch.ones_like(x)
    y, y_weights, event = buffer.combine(
        recv_x, handle=handle, topk_weights=recv_weights, bias=bias, async_with_compute_stream=True
    )
    event.current_stream_wait()
    number = np.array([len(world.ranks(rank, t)) for t in range(len(idx))]).reshape(-1, 1)
    same(y, xs[rank] * number + 1, torch.bfloat16)
    same(y_weights, np.where(world.idx[rank] >= 0, world.weights[rank], 0), torch.float32)


@pytest.mark.parametrize(("synced", "alignment"), [(True, 1), (True, 8), (False, 1)])
def test_tokens(synced: bool, alignment: int) -> None:
    launcher.pool().run(3, run_tokens, synced, alignment)


def run_expanded(group: Any, synced: bool, alignment: int, device: str = "cpu") -> None:
    from epcomm.compat.deep_ep import ElasticBuffer

    world = worlds(12, group.size(), [6, 3, 10], TOPK, LOCAL)
    rank, size = group.rank(), group.size()
    xs, x, idx, weights = inputs(world, rank, device=device)
    buffer = ElasticBuffer(group, 1 << 20)
    recv_x, recv_idx, recv_weights, handle, _ = buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        num_experts=world.num_experts,
        num_max_tokens_per_rank=MOST,
        expert_alignment=alignment,
        do_expand=True,
        do_cpu_sync=synced,
        do_zero_padding=True,
    )
    assert recv_idx is None and handle.do_expand
    check_handle(handle, world, rank, alignment, synced)
    rows, begins = expanded(world, rank, alignment)
    worst = aligned(size * MOST * min(TOPK, LOCAL) + (alignment - 1) * LOCAL, alignment)
    n = len(rows) if synced else worst
    assert recv_x.shape == (n, HIDDEN) and recv_weights.shape == (n,)
    per_row = np.zeros(len(rows), dtype=np.float32)
    for e in range(LOCAL):
        expert = rank * LOCAL + e
        for i, (s, t) in enumerate(world.expert_rows(rank, e)):
            (k,) = np.flatnonzero(world.idx[s][t] == expert)
            per_row[begins[e] + i] = world.weights[s][t, k]
    same(recv_weights[: len(rows)], per_row, torch.float32)
    zeros = np.zeros((1, HIDDEN), dtype=np.float32)
    expected = np.concatenate(
        [zeros, *(zeros if r is None else xs[r[0]][r[1]][None] for r in rows)]
    )
    same(recv_x[: len(rows)], expected[1:], torch.bfloat16)
    assert not recv_x[len(rows) :].any()
    for row, (s, t) in zip(handle.recv_src_metadata.tolist(), world.rows(rank), strict=False):
        places = [begins[e] + world.expert_rows(rank, e).index((s, t)) if e >= 0 else -1
                  for e in (int(i) - rank * LOCAL if int(i) // LOCAL == rank and i >= 0 else -1
                            for i in world.idx[s][t])]  # fmt: skip
        assert row[2:] == places

    out = recv_x * recv_weights.unsqueeze(1)
    out[[i for i, r in enumerate(rows) if r is None]] = float("nan")
    out[len(rows) :] = float("nan")
    y, y_weights, _ = buffer.combine(out.bfloat16(), handle, topk_weights=recv_weights)
    used = np.where(world.idx[rank] >= 0, world.weights[rank], 0)
    same(y, xs[rank] * used.sum(1, keepdims=True), torch.bfloat16)
    same(y_weights, used, torch.float32)
    again = buffer.dispatch(x, handle=handle, topk_weights=weights, do_cpu_sync=False)
    assert again[1] is None
    same(again[2][: len(rows)], per_row, torch.float32)


@pytest.mark.parametrize(("synced", "alignment"), [(True, 1), (True, 16), (False, 8)])
def test_expanded(synced: bool, alignment: int) -> None:
    launcher.pool().run(3, run_expanded, synced, alignment)


def run_fp8(group: Any, do_expand: bool, later: bool, device: str = "cpu") -> None:
    from epcomm.compat.deep_ep import ElasticBuffer

    world = worlds(13, group.size(), [5, 2], TOPK, LOCAL)
    rank = group.rank()
    xs, x, idx, weights = inputs(world, rank, device=device)
    tables = [payload(9, r, len(world.idx[r]), 5) for r in range(world.num_ranks)]
    buffer = ElasticBuffer(group, num_max_tokens_per_rank=MOST, use_fp8_dispatch=True)
    pair = (x.to(torch.float8_e4m3fn), torch.from_numpy(tables[rank]).to(device))
    stats = torch.arange(LOCAL, dtype=torch.int32, device=device)
    how: dict[str, Any] = {}
    if later:
        how = {"async_with_compute_stream": True, "previous_event": ElasticBuffer.capture()}
    (q, scales), _, _, _, event = buffer.dispatch(
        pair,
        topk_idx=idx,
        topk_weights=weights,
        num_experts=world.num_experts,
        do_expand=do_expand,
        use_tma_aligned_col_major_sf=True,
        cumulative_local_expert_recv_stats=stats,
        **how,
    )
    event.current_stream_wait()
    same(stats, np.arange(LOCAL) + world.counts(rank), torch.int32)
    rows = expanded(world, rank, 1)[0] if do_expand else world.rows(rank)
    same(q.bfloat16(), gathered(xs, rows), torch.bfloat16)
    same(scales, gathered(tables, rows), torch.float32)
    assert scales.stride() == (1, aligned(len(rows), 4))


@pytest.mark.parametrize("do_expand", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_fp8_pairs(do_expand: bool, later: bool) -> None:
    launcher.pool().run(2, run_fp8, do_expand, later)


def run_rest(group: Any) -> None:
    import weakref

    import epcomm
    from epcomm.compat.deep_ep import (
        ElasticBuffer,
        get_logical_domain_size,
        get_physical_domain_size,
    )

    hint = ElasticBuffer.get_buffer_size_hint(group, 128, 7168, num_topk=8, use_fp8_dispatch=True)
    assert isinstance(hint, int) and hint > 0
    buffer = ElasticBuffer(group, num_max_tokens_per_rank=4, explicitly_destroy=True)
    assert weakref.ref(buffer)() is buffer
    assert (buffer.rank_idx, buffer.num_ranks) == (group.rank(), group.size())
    sms = buffer.get_theoretical_num_sms(num_experts=256, num_topk=8)
    assert isinstance(sms, int) and sms > 0 and isinstance(buffer.get_theoretical_num_qps(sms), int)
    nodes, ranks = buffer.get_physical_domain_size()
    assert nodes * ranks == group.size() and buffer.get_logical_domain_size() == (nodes, ranks)
    assert get_physical_domain_size(group) == get_logical_domain_size(group) == (nodes, ranks)
    buffer.barrier()
    x, idx = torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(5, 1, dtype=torch.int64)
    for call, word in (
        (lambda: buffer.dispatch(x, idx, num_experts=4), "num_max_tokens_per_rank"),
        (lambda: buffer.dispatch(x, idx), "num_experts"),
        (lambda: buffer.dispatch(x[:4], idx[:4], num_experts=5), "num_experts"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
    for name in ("engram_fetch", "pp_send", "all_gather"):
        with pytest.raises(NotImplementedError, match=name):
            getattr(buffer, name)(x)
    *_, handle, _ = buffer.dispatch(x[:4], idx[:4], num_experts=4)
    with pytest.raises(ValueError, match="do_cpu_sync"):
        buffer.dispatch(x[:4], handle=handle, do_cpu_sync=True)
    buffer.destroy()
    with pytest.raises(epcomm.BufferUnusable):
        buffer.combine(x[:4], handle)


def test_the_rest() -> None:
    launcher.pool().run(2, run_rest)
