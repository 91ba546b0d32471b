"""The GPU transports on simulated devices: the conformance cases, without a GPU."""

import itertools
import os
from typing import Any

import pytest
import torch

import launcher
from cases import CASES, FORMATS
from checks import Layout
from simulated import needs_simulator
from test_conformance import LAYOUTS, Transport, run_cases

pytestmark = needs_simulator


# Every format and every number of ranks, not each with each: a simulated GPU is slow. "card" is
# rdma, over a simulated network card; "window" nccl, through the peers' windows.
GRID = [
    ("large", 1, "bf16"),
    ("large", 2, "fp32"),
    ("large", 2, "packed"),
    ("large", 3, "fp16"),
    ("large", 2, "fp8"),
    ("large", 4, "bf16"),
    ("small", 1, "fp16"),
    ("small", 2, "bf16"),
    ("small", 2, "fp8"),
    ("small", 3, "packed"),
    ("small", 4, "fp32"),
    ("small", 1, "quant_fp8_ue8m0"),
    ("small", 2, "quant_fp8"),
    ("small", 2, "quant_nvfp4"),
    ("card", 2, "packed"),
    ("card", 2, "quant_fp8"),
    ("card", 3, "fp16"),
    ("window", 3, "packed"),
]


def layouts_of(entry: int) -> tuple[Layout, ...]:
    """For an entry of a grid: one alignment of layout "expert", later ones have another. Only
    routing knows of alignments, and it is the same for all formats and ways of a transport."""
    aligned = [one for one in LAYOUTS if one.name == "expert"]
    return Layout("token"), aligned[entry // 3 % len(aligned)], Layout("padded")


def two_layouts_of(entry: int) -> tuple[Layout, ...]:
    """Where a grid has several entries of a way: each leaves out another layout."""
    return tuple(one for i, one in enumerate(layouts_of(entry)) if i != entry % 3)


def transport_of(path: str) -> Transport:
    if path == "card":
        return Transport("rdma")
    if path == "window":
        return Transport("nccl", options=(("algorithm", "window"),))
    return Transport("nvlink", options=(("path", path),))


@pytest.mark.parametrize(("path", "num_ranks", "fmt"), GRID)
def test_conformance(path: str, num_ranks: int, fmt: str) -> None:
    pool = launcher.pool("simulated")
    # "window" stands here once.
    some = layouts_of if path == "window" else two_layouts_of
    layouts = some(GRID.index((path, num_ranks, fmt)))
    arguments = (transport_of(path), None, layouts, FORMATS[fmt])
    done = pool.run(num_ranks, run_cases, *arguments, timeout=300.0)
    assert done == [len(CASES)] * num_ranks


# Between nodes, over a simulated network card: ranks and ranks_per_node, even and uneven.
NODES_GRID = [(2, 1, "packed"), (4, 2, "bf16"), (4, 1, "fp16"), (3, 2, "fp32")]


@pytest.mark.parametrize(("num_ranks", "ranks_per_node", "fmt"), NODES_GRID)
def test_nodes(num_ranks: int, ranks_per_node: int, fmt: str) -> None:
    pool = launcher.pool("simulated")
    transport = Transport("hierarchical", options=(("chunk_tokens", 3),))
    layouts = two_layouts_of(NODES_GRID.index((num_ranks, ranks_per_node, fmt)))
    arguments = (transport, ranks_per_node, layouts, FORMATS[fmt])
    done = pool.run(num_ranks, run_cases, *arguments, timeout=300.0)
    assert done == [len(CASES)] * num_ranks


# The same, over a fake libnccl. Batches are too small to be cut into chunks: that is tested in
# tests/sim/nccl_sim_test.cc.
NCCL_GRID = [
    ((), 2, "fp8"),
    ((("chunks", 3),), 3, "fp8"),
    ((("algorithm", "small"), ("schedule", "shifted")), 3, "bf16"),
    ((("algorithm", "static"), ("schedule", "gathered")), 2, "packed"),
    ((("algorithm", "static"),), 4, "bf16"),
    ((("algorithm", "allgather"),), 3, "fp32"),
]


def run_nccl_cases(group: Any, *args: Any) -> int:
    """Small batches, too, go through NCCL."""
    os.environ["NCCL_P2P_DISABLE"] = "1"
    try:
        return run_cases(group, *args)
    finally:
        del os.environ["NCCL_P2P_DISABLE"]


@pytest.mark.parametrize(("options", "num_ranks", "fmt"), NCCL_GRID)
def test_nccl(options: tuple[tuple[str, Any], ...], num_ranks: int, fmt: str) -> None:
    pool = launcher.pool("simulated")
    layouts = layouts_of(NCCL_GRID.index((options, num_ranks, fmt)))
    args = (Transport("nccl", options=options), None, layouts, FORMATS[fmt])
    done = pool.run(num_ranks, run_nccl_cases, *args, timeout=300.0)
    assert done == [len(CASES)] * num_ranks


def run_halves(group: Any, path: str) -> None:
    """Calls with return_recv_hook: in halves, completed by the hook or by the next call."""
    import epcomm

    arguments: dict[str, Any] = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 16}
    arguments |= transport_of(path).buffer_arguments(None)
    with epcomm.Buffer(group, **arguments) as buf:
        assert buf.caps.small_batches and buf.caps.two_phases
        rng = torch.Generator().manual_seed(buf.rank)
        for round in range(6):
            x = torch.randint(-8, 9, (12, 64), generator=rng).bfloat16()
            idx = torch.rand(12, 8, generator=rng).topk(2).indices
            weights = 2.0 ** torch.randint(-2, 2, (12, 2), generator=rng)
            calls = {"layout": ("token", "expert", "padded")[round % 3], "host_sync": round < 3}
            recv = buf.dispatch(x, idx, weights, return_recv_hook=True, **calls)
            assert recv.hook is not None
            if round % 2 == 0:
                recv.hook()
                recv.hook()  # once is enough
                out = recv.x
            else:
                recv = buf.dispatch(x, idx, weights, **calls)  # completes the one before
                out = recv.x
            y, _, hook = buf.combine(out, recv.plan, topk_weights=weights, return_recv_hook=True)
            again = buf.combine(out, recv.plan, topk_weights=weights)
            assert hook is not None
            hook()
            assert torch.equal(y, again)
            assert torch.equal(y.float(), x.float() * weights.sum(1, keepdim=True))


def run_quantised_halves(group: Any, path: str) -> None:
    """Rows that are quantised on the way, in halves: what a whole call delivers."""
    import epcomm
    from epcomm.streams import ReceiveHalf

    arguments: dict[str, Any] = {"num_experts": 8, "hidden": 128, "topk": 2, "max_tokens": 16}
    arguments |= transport_of(path).buffer_arguments(None)
    with epcomm.Buffer(group, **arguments) as buf:
        rng = torch.Generator().manual_seed(buf.rank)
        x = torch.randn(12, 128, generator=rng).bfloat16()
        idx = torch.rand(12, 8, generator=rng).topk(2).indices
        for kind in ("fp8", "fp8_ue8m0", "nvfp4"):
            assert kind in [one.name for one in buf.caps.fused_quants]
            recv = buf.dispatch(x, idx, quant=kind, return_recv_hook=True)
            assert isinstance(recv.hook, ReceiveHalf), "the call was not made in halves"
            recv.hook()
            whole = buf.dispatch(x, idx, quant=kind)
            pairs = [*zip(recv.x, whole.x, strict=True)]
            if kind == "nvfp4":
                pairs.append((recv.global_scale, whole.global_scale))
            for got, wanted in pairs:
                assert torch.equal(got.float(), wanted.float())


@pytest.mark.parametrize("path", ["small", "card"])
def test_quantised_halves(path: str) -> None:
    launcher.pool("simulated").run(2, run_quantised_halves, path)


@pytest.mark.parametrize("path", ["small", "card", "window"])
def test_halves(path: str) -> None:
    launcher.pool("simulated").run(3, run_halves, path)


def watch_settle(buf: Any) -> list[bool]:
    """What settle will have said in the Buffer's calls: whether there was room enough."""
    sent: list[bool] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(buf._native, name)

        def settle(self, plan: Any) -> Any:
            settled = buf._native.settle(plan)
            sent.append(settled[1])
            return settled

    buf._end.native = Watched()
    return sent


def run_small_ahead(group: Any, path: str) -> None:
    """Small batches for which the host waits: one kernel sends them and tells the counts."""
    import epcomm
    from epcomm import plans

    arguments: dict[str, Any] = {"num_experts": 8, "hidden": 128, "topk": 3, "max_tokens": 32}
    arguments |= transport_of(path).buffer_arguments(None)
    with epcomm.Buffer(group, statistics=True, **arguments) as buf:
        assert buf.caps.small_batches and buf.caps.sends_ahead
        sent = watch_settle(buf)
        rng = torch.Generator().manual_seed(buf.rank)
        received, most_held = torch.zeros(buf.local_experts, dtype=torch.int64), plans.MOST_HELD
        made: list[tuple[Any, Any]] = []
        kinds = itertools.product(
            ("token", "expert", "padded"), (None, "fp8", "nvfp4"), (most_held, 0)
        )
        for round, (layout, quant, most) in enumerate(kinds):
            tokens = (30, 0, 3, 17)[(round + buf.rank) % 4]
            plans.MOST_HELD = most
            x = torch.randint(-8, 9, (tokens, 128), generator=rng).bfloat16()
            idx = torch.rand(tokens, 8, generator=rng).topk(3).indices
            idx[torch.rand(tokens, 3, generator=rng) < 0.2] = -1
            weights = 2.0 ** torch.randint(-2, 2, (tokens, 3), generator=rng)
            how = {"layout": layout, "quant": quant}
            if layout == "expert":
                how["expert_alignment"] = 4
            before = len(sent)
            recv = buf.dispatch(x, idx, weights, async_op=round % 2 == 1, **how)
            assert len(sent) == before + (most != 0)
            late = buf.dispatch(x, idx, weights, host_sync=False, **how)
            again = buf.dispatch(x, topk_weights=weights, plan=recv.plan, quant=quant)
            received += 3 * recv.tokens_per_expert
            n = int(late.num_tokens)
            assert recv.plan.num_recv_tokens == recv.plan.recv_capacity == n
            assert recv.plan.native.num_recv_tokens == n
            assert recv.plan.native.tokens_per_expert == late.tokens_per_expert.tolist()
            rows = {"token": n, "expert": int(late.plan.expert_offsets[-1])}.get(layout)
            assert layout == "padded" or recv.plan.num_recv_rows == rows
            for got in (recv, again):
                outputs = list(zip(parts_of(got), parts_of(late), strict=True))
                for one, other in outputs:
                    assert (one is None) == (other is None)
                    if one is None:
                        continue
                    assert rows is None or len(one) == rows
                    if rows is None:
                        filled = torch.arange(one.shape[1]) < late.tokens_per_expert[:, None]
                        one, other = one[filled], other[filled]
                    elif layout == "expert":
                        filled = late.topk_idx[:rows] >= 0
                        one, other = one[filled], other[:rows][filled]
                    assert torch.equal(one.float(), other[: len(one)].float())
            for of in ("tokens_per_expert", "expert_offsets", "num_recv", "rank_count"):
                assert torch.equal(getattr(recv.plan, of), getattr(late.plan, of)), of
            made.append((recv, bits_of(recv)))
            if quant is None:
                y = buf.combine(recv.x, recv.plan, topk_weights=weights)
                scale = (weights * (idx >= 0)).sum(1, keepdim=True)
                assert torch.equal(y.float(), x.float() * scale)
        plans.MOST_HELD = most_held
        for recv, bits in made:  # later calls have not touched what was received
            assert all(map(torch.equal, bits_of(recv), bits))
        assert sent == [True] * len(sent)
        assert torch.equal(buf.statistics().received_tokens, received)

        x, idx = torch.ones(8, 128).bfloat16(), torch.arange(16).view(8, 2) % 8
        buf.dispatch(x, idx)
        if buf.num_ranks > 1:
            with pytest.raises(epcomm.ConfigMismatch, match="topk"):
                buf.dispatch(x, idx if buf.rank else idx[:, :1].contiguous())
            with pytest.raises(epcomm.ConfigMismatch, match="host_sync"):
                buf.dispatch(x, idx, host_sync=buf.rank == 0)
        bad, last = idx.clone(), buf.num_ranks - 1
        if buf.rank == last:
            bad[3, 1] = 8
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"rank {last} .token 3, slot 1. is 8"):
                buf.dispatch(x, bad)
        recv = buf.dispatch(x, idx)
        assert torch.equal(buf.combine(recv.x, recv.plan).float()[:, 0] % 1, torch.zeros(8))


def parts_of(recv: Any) -> tuple[Any, ...]:
    rows = recv.x if isinstance(recv.x, tuple) else (recv.x,)
    return (*rows, recv.topk_idx, recv.topk_weights, recv.global_scale)


def bits_of(recv: Any) -> list[torch.Tensor]:
    parts = [part for part in parts_of(recv) if part is not None]
    return [torch.empty(p.shape, dtype=p.dtype).copy_(p).view(torch.uint8) for p in parts]


@pytest.mark.parametrize(
    ("path", "num_ranks"), [("small", 1), ("small", 3), ("card", 2), ("window", 2)]
)
def test_small_batches_ahead_of_counts(path: str, num_ranks: int) -> None:
    launcher.pool("simulated").run(num_ranks, run_small_ahead, path)


def run_ahead(group: Any, transport: Transport, ranks_per_node: int | None) -> None:
    """Rows are sent before the host knows how many arrive, into memory of a guessed size."""
    import epcomm

    arguments: dict[str, Any] = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 300}
    arguments |= transport.buffer_arguments(ranks_per_node) | {"window_bytes": 6 << 20}
    with epcomm.Buffer(group, **arguments) as buf:
        assert buf.caps.sends_ahead
        sent = watch_settle(buf)
        rng = torch.Generator().manual_seed(buf.rank)
        # The first call waits for the counts; 290 after 20, and all of 8 ranks to rank 0, is more
        # than a guess has room for.
        for tokens, layout, first_experts in (
            *((20, "token", 8), (20, "token", 8), (290, "token", 8), (280, "token", 8)),
            *((290, "token", 2), (0, "token", 8), (0, "token", 8), (300, "token", 8)),
            *((20, "expert", 8), (200, "expert", 8), (200, "expert", 8), (9, "padded", 8)),
            *((300, "padded", 8), (1, "padded", 8)),
        ):
            x = torch.randint(-8, 9, (tokens, 64), generator=rng).bfloat16()
            idx = torch.rand(tokens, first_experts, generator=rng).topk(2).indices
            weights = 2.0 ** torch.randint(-2, 2, (tokens, 2), generator=rng)
            recv = buf.dispatch(x, idx, weights, layout=layout, expert_alignment=4)
            assert isinstance(recv.x, torch.Tensor) and recv.plan.num_recv_tokens is not None
            assert int(recv.num_tokens) == recv.plan.num_recv_tokens
            if layout != "padded":
                assert recv.x.shape[0] == recv.plan.num_recv_rows
                assert recv.topk_idx is not None and recv.topk_idx.shape[0] == recv.x.shape[0]
            y = buf.combine(recv.x, recv.plan, topk_weights=weights)
            assert torch.equal(y.float(), x.float() * weights.sum(1, keepdim=True))
            again = buf.dispatch(x, plan=recv.plan)
            assert isinstance(again.x, torch.Tensor) and again.x.shape == recv.x.shape
            if layout == "token":
                assert torch.equal(again.x, recv.x)
        alone = group.size() == 1
        wanted = [True, False, True, alone, True, True, False, False, True, False, True]
        assert sent == wanted, sent
        # What ranks disagree on, and expert ids that do not exist, are told to all as ever.
        x = torch.ones(8, 64).bfloat16()
        wide = torch.ones(8, 64).to(torch.float8_e4m3fn), torch.ones(8, 32)
        idx = torch.arange(16).view(8, 2) % 8
        buf.dispatch(x, idx)
        if buf.num_ranks > 1:
            with pytest.raises(epcomm.ConfigMismatch, match="topk"):
                buf.dispatch(x, idx if buf.rank else idx[:, :1].contiguous())
            with pytest.raises(epcomm.ConfigMismatch, match="dtype"):
                buf.dispatch(x if buf.rank else wide, idx)
        if transport.name == "hierarchical":
            with pytest.raises(ValueError, match="64 bytes per row and 128 of scales"):
                buf.dispatch(wide, idx)
        bad = idx.clone()
        if buf.rank == buf.num_ranks - 1:
            bad[3, 1] = 8
        with pytest.raises(ValueError, match=rf"rank {buf.num_ranks - 1} .token 3, slot 1. is 8"):
            buf.dispatch(x, bad)
        recv = buf.dispatch(x, idx)
        held = [recv.x]
        with pytest.raises(epcomm.WindowFull):
            for _ in range(10000):
                held.append(buf.dispatch(x.repeat(30, 1), idx.repeat(30, 1)).x)
        held.clear()
        recv = buf.dispatch(x, idx)
        assert torch.equal(buf.combine(recv.x, recv.plan).float()[:, 0] % 1, torch.zeros(8))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rows_ahead_of_counts(num_ranks: int) -> None:
    launcher.pool("simulated").run(num_ranks, run_ahead, transport_of("large"), None)


def test_rows_between_nodes_ahead_of_counts() -> None:
    launcher.pool("simulated").run(3, run_ahead, Transport("hierarchical"), 2)


def run_too_large(group: Any) -> None:
    """rdma is for small batches, and says so, on all ranks alike."""
    import epcomm

    arguments: dict[str, Any] = {"num_experts": 8, "hidden": 64, "topk": 2, "transport": "rdma"}
    with pytest.raises(ValueError, match=r"small batches only.*257.*at most 256.*nccl"):
        epcomm.Buffer(group, max_tokens=257, **arguments)
    with pytest.raises(ValueError, match="rdma transport has no options"):
        epcomm.Buffer(group, max_tokens=8, transport_options={"path": "small"}, **arguments)
    with epcomm.Buffer(group, max_tokens=256, **arguments) as buf:
        assert buf.caps.small_batches and not buf.caps.symmetric_outputs


def test_too_large() -> None:
    launcher.pool("simulated").run(2, run_too_large)
