"""`Buffer.statistics`: received tokens against counts from the routing, waits against a clock."""

import os
import time
from typing import Any

import pytest
import torch

import launcher
from simulated import needs_simulator

EXPERTS, TOPK, HIDDEN, MAX_TOKENS = 15, 3, 128, 40  # experts do not divide by 4 ranks
LATE_S = 0.4

# Device, ranks, further arguments of the Buffer.
CPU = [
    ("cpu", 3, {"transport": "cpu"}),
    ("cpu", 4, {"transport": "hierarchical", "ranks_per_node": 2}),
]
SIMULATED = [
    ("simulated", 3, {"transport": "nvlink", "transport_options": {"path": path}})
    for path in ("small", "large")
] + [("simulated", 2, {"transport": "nccl", "transport_options": {"algorithm": "window"}})]
GPU = [
    ("cuda", 0, {"transport": "nvlink", "transport_options": {"path": "small"}}),
    ("cuda", 0, {"transport": "nvlink", "transport_options": {"path": "large"}}),
    ("cuda", 0, {"transport": "nccl", "transport_options": {"algorithm": "small"}}),
    ("cuda", 0, {"transport": "nccl", "transport_options": {"algorithm": "window"}}),
]


def _through_nccl(arguments: dict[str, Any]) -> bool:
    """NCCL moves the rows: waits are not timed, nor is compared what ranks replay."""
    return arguments.get("transport_options") == {"algorithm": "small"}


def _grid(kinds: list[tuple[str, int, dict[str, Any]]]) -> list[Any]:
    def id_of(device: str, arguments: dict[str, Any]) -> str:
        options = arguments.get("transport_options", {})
        return "-".join((device, arguments["transport"], *options.values()))

    marks = {"cuda": pytest.mark.gpu, "simulated": needs_simulator}
    return [
        pytest.param(*kind, id=id_of(kind[0], kind[2]), marks=marks.get(kind[0], ()))
        for kind in kinds
    ]


def _run(device: str, num_ranks: int, fn: Any, *args: Any) -> list[Any]:
    pool = launcher.pool(device)
    return pool.run(num_ranks or pool.size, fn, device, *args)


def _make(group: Any, arguments: dict[str, Any], **changes: Any) -> Any:
    import epcomm

    sizes = {"num_experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK, "max_tokens": MAX_TOKENS}
    return epcomm.Buffer(group, **{**sizes, "statistics": True, **arguments, **changes})


def _ids(call: int, rank: int) -> torch.Tensor:
    """Few tokens name an expert twice, some name none; every call has another number of them."""
    rng = torch.Generator().manual_seed(100 * call + rank)
    tokens = int(torch.randint(0, MAX_TOKENS + 1, (1,), generator=rng))
    return torch.randint(-1, EXPERTS, (tokens, TOPK), generator=rng)


class _Expected:
    """What this rank's experts must have received, from the ids alone."""

    def __init__(self, group: Any):
        per_rank = -(-EXPERTS // group.size())
        self.ranks = group.size()
        self.mine = list(range(EXPERTS))[per_rank * group.rank() : per_rank * (group.rank() + 1)]
        self.counts = [0] * len(self.mine)

    def add(self, call: int, times: int = 1) -> None:
        tokens = [set(t) for r in range(self.ranks) for t in _ids(call, r).tolist()]
        for i, expert in enumerate(self.mine):
            self.counts[i] += times * sum(expert in t for t in tokens)


def run_received(group: Any, device: str, arguments: dict[str, Any]) -> None:
    import epcomm

    target = "cuda" if device == "cuda" else "cpu"
    buf, expected = _make(group, arguments), _Expected(group)

    def counted(**options: bool) -> list[int]:
        received = buf.statistics(**options).received_tokens
        assert received.dtype == torch.int64
        return received.tolist()

    assert counted() == expected.counts == [0] * buf.local_experts
    for call in range(6):
        idx = _ids(call, group.rank()).to(target)
        x = torch.ones(len(idx), HIDDEN, dtype=torch.bfloat16, device=target)
        layout = ("token", "expert", "padded")[call % 3]
        recv = buf.dispatch(x, idx, layout=layout, host_sync=call < 3)
        expected.add(call)
        assert counted() == expected.counts
        buf.combine(recv.x, recv.plan)
        if call % 2 == 0:
            buf.dispatch(x, plan=recv.plan)
            expected.add(call)
        if call % 3 == 2:
            hooked = buf.dispatch(x, idx, return_recv_hook=True)
            hooked.hook()
            expected.add(call)
        assert counted() == expected.counts
        if not _through_nccl(arguments):
            weights = torch.ones(len(idx), TOPK, device=target)
            with pytest.raises(epcomm.ConfigMismatch):
                buf.dispatch(x, None, weights if group.rank() == 0 else None, plan=recv.plan)
                if device == "cuda":
                    torch.cuda.synchronize()
                buf.check_faults()
            assert counted() == expected.counts  # a refused call delivers nothing
        if call == 3:
            assert counted(reset=True) == expected.counts
            assert counted() == [0] * buf.local_experts
            expected = _Expected(group)
    buf.destroy()
    assert counted() == expected.counts


@pytest.mark.parametrize(("device", "num_ranks", "arguments"), _grid(CPU + SIMULATED + GPU))
def test_received_tokens(device: str, num_ranks: int, arguments: dict[str, Any]) -> None:
    _run(device, num_ranks, run_received, arguments)


def run_waits(group: Any, device: str, arguments: dict[str, Any]) -> None:
    target = "cuda" if device == "cuda" else "cpu"
    late = group.size() - 1
    with _make(group, arguments) as buf:
        x = torch.ones(8, HIDDEN, dtype=torch.bfloat16, device=target)
        idx = (torch.arange(8 * TOPK, device=target) % EXPERTS).view(8, TOPK)
        recv = buf.dispatch(x, idx, host_sync=False)
        for call in ("dispatch", "replay", "combine"):
            buf.statistics(reset=True)
            torch.distributed.barrier(group)
            began = time.monotonic()
            if group.rank() == late:
                time.sleep(LATE_S)
            if call == "dispatch":
                recv = buf.dispatch(x, idx, host_sync=False)
            elif call == "replay":
                buf.dispatch(x, plan=recv.plan)
            else:
                buf.combine(recv.x, recv.plan)
            waits = buf.statistics().max_wait_us.tolist()
            elapsed_us = 1e6 * (time.monotonic() - began)
            assert len(waits) == group.size()
            assert all(0.0 <= us <= elapsed_us for us in waits), (call, waits, elapsed_us)
            if group.rank() != late:
                others = max(us for r, us in enumerate(waits) if r != late)
                assert waits[late] > 0.5e6 * LATE_S, (call, waits)
                assert waits[late] > 2 * others, (call, waits)
        # The longest of several, not their sum.
        longest = buf.statistics(reset=True).max_wait_us
        for _ in range(20):
            buf.dispatch(x, plan=recv.plan)
        again = buf.statistics().max_wait_us
        assert longest.dtype == torch.float32
        assert float(again.max()) < 0.5e6 * LATE_S


@pytest.mark.parametrize(
    ("device", "num_ranks", "arguments"),
    _grid([kind for kind in CPU + SIMULATED + GPU if not _through_nccl(kind[2])]),
)
def test_waits(device: str, num_ranks: int, arguments: dict[str, Any]) -> None:
    _run(device, num_ranks, run_waits, arguments)


def run_replayed_graph(group: Any, device: str, arguments: dict[str, Any]) -> None:
    tokens = 16
    idx = torch.empty(tokens, TOPK, dtype=torch.int64, device="cuda")
    x = torch.ones(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    with _make(group, arguments) as buf:
        sums = torch.zeros(buf.local_experts, dtype=torch.int64)
        idx.fill_(-1)
        buf.dispatch(x, idx, host_sync=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recv = buf.dispatch(x, idx, host_sync=False)
        for seed in range(20):
            rng = torch.Generator().manual_seed(seed * 97 + group.rank())
            idx.copy_(torch.randint(-1, EXPERTS, (tokens, TOPK), generator=rng))
            graph.replay()
            torch.cuda.synchronize()
            sums += recv.tokens_per_expert.cpu()
            assert torch.equal(buf.statistics().received_tokens.cpu(), sums)
        del graph
        assert int(sums.sum()) > 0


@pytest.mark.parametrize(("device", "num_ranks", "arguments"), _grid(GPU))
def test_graphs_count_at_every_replay(
    device: str, num_ranks: int, arguments: dict[str, Any]
) -> None:
    _run(device, num_ranks, run_replayed_graph, arguments)


def run_off(group: Any, device: str) -> None:
    with _make(group, {"transport": "cpu"}, statistics=group.rank() == 0) as buf:
        x = torch.ones(2, HIDDEN, dtype=torch.bfloat16)
        buf.dispatch(x, torch.zeros(2, TOPK, dtype=torch.int64))  # ranks may differ
        if group.rank() == 0:
            assert buf.statistics().received_tokens[0] == 2 * group.size()
        else:
            with pytest.raises(ValueError, match="statistics is False"):
                buf.statistics()
    for value, counts in (("1", True), ("0", False), ("", False)):
        os.environ["EPCOMM_STATISTICS"] = value
        try:
            with _make(group, {"transport": "cpu"}, statistics=None) as buf:
                assert (buf._end.counters is not None) == counts
        finally:
            del os.environ["EPCOMM_STATISTICS"]


def test_off_unless_asked_for() -> None:
    _run("cpu", 2, run_off)
