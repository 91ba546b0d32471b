"""What GPU transports must do beyond the conformance suite: CUDA graphs, streams, lost peers."""

import os
import signal
import time
from typing import Any

import pytest
import torch

import launcher

pytestmark = pytest.mark.gpu

# Transport and its options; those that a graph can capture.
KINDS = (
    ("nccl", {"algorithm": "static"}),
    ("nccl", {"algorithm": "allgather"}),
    ("nccl", {"algorithm": "small"}),
    ("nccl", {"algorithm": "window"}),
    ("nvlink", {"path": "small"}),
    ("nvlink", {"path": "large"}),
)
# Transport and max_tokens: 256 takes the path for small batches of nvlink, and of nccl where
# nothing forbids it the memory of peers; 600 does not.
SIZES = (("nccl", 600), ("nccl", 256), ("nvlink", 600), ("nvlink", 256))


def make(group: Any, transport: str, **changes: Any) -> Any:
    import epcomm

    arguments = {
        "num_experts": 16,
        "hidden": 256,
        "topk": 4,
        "max_tokens": 600,
        "transport": transport,
        "timeout": launcher.TIMEOUT_S,
    }
    return epcomm.Buffer(group, **{**arguments, **changes})


def batch(seed: int, tokens: int, experts: int = 16, topk: int = 4) -> tuple[torch.Tensor, ...]:
    """Rows, expert ids (some -1) and weights; small integers and powers of two: sums are exact."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, (tokens, 256), generator=rng).bfloat16().cuda()
    idx = torch.rand(tokens, experts, generator=rng).topk(topk).indices
    idx[torch.rand(tokens, topk, generator=rng) < 0.1] = -1
    weights = 2.0 ** torch.randint(-2, 2, (tokens, topk), generator=rng)
    return x, idx.cuda(), weights.cuda()


def check_round_trip(x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> None:
    """If experts return their input, y = x * the sum of the weights of experts that exist."""
    expected = x.float() * (w * (idx >= 0)).sum(1, keepdim=True)
    assert torch.equal(y.float(), expected.bfloat16().float())


def run_graph(
    group: Any, layout: str, transport: str, options: dict[str, str] | None = None
) -> None:
    """One captured dispatch and combine, replayed with new rows and new routing."""
    tokens = 64
    buf = make(group, transport, max_tokens=tokens, transport_options=options)
    x, idx, weights = batch(buf.rank, tokens)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        recv = buf.dispatch(x, idx, weights, layout=layout, host_sync=False)
        returned = buf.combine_topk_weights(recv.topk_weights, recv.plan)
        return buf.combine(recv.x, recv.plan, topk_weights=weights), returned

    def check(y: torch.Tensor, returned: torch.Tensor) -> None:
        check_round_trip(x, idx, weights, y)
        assert torch.equal(returned, weights * (idx >= 0))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, returned = call()
    for seed in range(50):
        for to, new in zip((x, idx, weights), batch(1000 * seed + buf.rank, tokens), strict=True):
            to.copy_(new)
        y.fill_(float("nan"))
        returned.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check(y, returned)
        check(*call())  # eager calls in between
    began = time.monotonic()
    buf.destroy()  # while the graph still holds its kernels
    assert time.monotonic() - began < 3.0
    del graph


@pytest.mark.parametrize(
    ("transport", "options"), KINDS, ids=lambda v: v if isinstance(v, str) else "".join(v.values())
)
@pytest.mark.parametrize("layout", ["token", "expert", "padded"])
def test_graph(layout: str, transport: str, options: dict[str, str]) -> None:
    pool = launcher.pool("cuda")
    pool.run(pool.size, run_graph, layout, transport, options)


def run_soak(group: Any, calls: int, transport: str, max_tokens: int) -> None:
    """Two Buffers in turn, random sizes and layouts, eager, asynchronous and in halves."""
    other = {"algorithm": "static"} if transport == "nccl" else {"path": "large"}
    bufs = [
        make(group, transport, max_tokens=max_tokens),
        make(group, transport, max_tokens=max_tokens, transport_options=other),
    ]
    rng = torch.Generator().manual_seed(7)
    for _ in range(calls):
        draw = torch.randint(0, 1 << 30, (8,), generator=rng).tolist()
        buf = bufs[draw[0] % 2]
        x, idx, weights = batch(draw[1] + buf.rank, (draw[2] + 37 * buf.rank) % (max_tokens + 1))
        layout = ("token", "expert", "padded")[draw[3] % 3]
        how = ({}, {"async_op": True}, {"return_recv_hook": True})[draw[5] % 3]
        recv = buf.dispatch(x, idx, weights, layout=layout, host_sync=draw[4] % 2 == 0, **how)
        if recv.hook is not None:
            recv.hook()
        recv.event.wait()
        y = buf.combine(recv.x, recv.plan, topk_weights=weights, **how)
        if how:
            if y.hook is not None:
                y.hook()
            y.event.wait()
            y = y.y
        check_round_trip(x, idx, weights, y)
    for buf in bufs:
        buf.destroy()


@pytest.mark.parametrize(("transport", "max_tokens"), SIZES)
def test_random_calls(transport: str, max_tokens: int) -> None:
    pool = launcher.pool("cuda")
    pool.run(pool.size, run_soak, 1000, transport, max_tokens, timeout=200.0)


def run_bad_id(group: Any, transport: str, max_tokens: int) -> None:
    buf = make(group, transport, max_tokens=max_tokens)
    x, idx, weights = batch(buf.rank, max_tokens // 2)
    bad = max_tokens // 2 - 30  # in the second tile of the larger batch
    if buf.rank == 1:
        idx[bad, 2] = 16
    for host_sync in (True, False):
        if host_sync:
            with pytest.raises(ValueError, match=rf"rank 1 .token {bad}, slot 2. is 16"):
                buf.dispatch(x, idx, weights)
        else:
            recv = buf.dispatch(x, idx, weights, host_sync=False)
            y = buf.combine(recv.x, recv.plan, topk_weights=weights)
            torch.cuda.synchronize()
            if buf.rank == 1:
                with pytest.raises(ValueError, match=rf"token {bad}, slot 2. is 16"):
                    buf.dispatch(x, idx, weights)
                idx[bad, 2] = -1
            check_round_trip(x, idx, weights, y)
    recv = buf.dispatch(x, idx, weights)
    check_round_trip(x, idx, weights, buf.combine(recv.x, recv.plan, topk_weights=weights))
    buf.destroy()


@pytest.mark.parametrize(("transport", "max_tokens"), SIZES)
def test_bad_expert_id(transport: str, max_tokens: int) -> None:
    pool = launcher.pool("cuda")
    pool.run(min(pool.size, 4), run_bad_id, transport, max_tokens)


def run_lost_peer(
    group: Any, parent: launcher.Parent, transport: str, max_tokens: int, host_sync: bool
) -> Any:
    import epcomm

    buf = make(group, transport, max_tokens=max_tokens, timeout=3.0)
    x, idx, weights = batch(buf.rank, max_tokens // 2)
    for _ in range(3):
        buf.dispatch(x, idx, weights)
    torch.cuda.synchronize()
    parent.tell("ready")
    parent.ask()
    began = time.monotonic()
    try:
        recv = buf.dispatch(x, idx, weights, host_sync=host_sync)
        recv.event.synchronize()
    except epcomm.PeerLost as lost:
        seconds = time.monotonic() - began
        # The CUDA context is usable, and so is a new Buffer over whoever is left.
        assert torch.ones(8, device="cuda").sum().item() == 8
        return lost.rank, lost.operation, lost.epoch, seconds, buf.caps.small_batches
    raise AssertionError("the call went through without a peer")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("host_sync", [True, False])
@pytest.mark.parametrize(("transport", "max_tokens"), SIZES)
def test_lost_peer(transport: str, max_tokens: int, host_sync: bool, how: signal.Signals) -> None:
    size = launcher.gpu_ranks(3)
    with launcher.spawn(
        size, run_lost_peer, transport, max_tokens, host_sync, device="cuda"
    ) as ranks:
        for r in range(size):
            assert ranks.hear(r, 120.0) == "ready"
        ranks.signal(size - 1, how)
        time.sleep(0.2)
        for r in range(size - 1):
            ranks.tell(r)
        for rank, operation, epoch, seconds, small in ranks.results(range(size - 1)):
            assert rank == size - 1
            assert operation in ("route", "dispatch")
            # Three calls before it: a small batch is one kernel, others route first.
            assert epoch == (4 if small else 7)
            assert seconds < 4.0
        if how == signal.SIGSTOP:
            os.kill(ranks.pids[-1], signal.SIGCONT)


def run_refusals(group: Any) -> None:
    """What ranks disagree on is refused by all, and the Buffer goes on."""
    import epcomm

    buf = make(group, "nvlink", window_bytes=8 << 20)
    x, idx, weights = batch(buf.rank, 300)
    odd = buf.rank == 0
    with pytest.raises(epcomm.ConfigMismatch, match="layout"):
        buf.dispatch(x, idx, weights, layout="expert" if odd else "token")
    recv = buf.dispatch(x, idx, weights)
    held = recv.x.clone()
    with pytest.raises(epcomm.ConfigMismatch, match="dtype"):
        y = buf.combine(recv.x.half() if odd else recv.x, recv.plan)
        torch.cuda.synchronize()
        buf.dispatch(x, idx, weights)
    kept = []
    with pytest.raises(epcomm.WindowFull) as full:
        for _ in range(1000):
            kept.append(buf.dispatch(x, idx, weights).x)
    assert full.value.needed_bytes > 0
    kept.clear()
    assert torch.equal(recv.x, held)
    y = buf.combine(recv.x, recv.plan, topk_weights=weights)
    check_round_trip(x, idx, weights, y)
    again = buf.dispatch(x, idx, weights)
    y = buf.combine(again.x, again.plan, topk_weights=weights)
    check_round_trip(x, idx, weights, y)
    buf.destroy()


def test_refusals() -> None:
    pool = launcher.pool("cuda")
    pool.run(pool.size, run_refusals)


def run_inputs(group: Any) -> None:
    """Rows that a combine returns may lie in the window on some ranks and elsewhere on others."""
    buf = make(group, "nvlink")
    for seed in range(20):
        x, idx, weights = batch(100 * seed + buf.rank, 300)
        recv = buf.dispatch(x, idx, weights)
        for elsewhere in (set(), {0}, set(range(1, buf.num_ranks)), set(range(buf.num_ranks))):
            out = recv.x.clone() if buf.rank in elsewhere else recv.x
            y = buf.combine(out, recv.plan, topk_weights=weights)
            check_round_trip(x, idx, weights, y)
            plain = buf.combine(out, recv.plan)
            owner = (idx // -(-16 // buf.num_ranks)).masked_fill(idx < 0, -1)
            sent = torch.stack([(owner == r).any(1) for r in range(buf.num_ranks)]).sum(0)
            assert torch.equal(plain.float(), x.float() * sent[:, None])
    buf.destroy()


def test_inputs_of_combine() -> None:
    pool = launcher.pool("cuda")
    pool.run(min(pool.size, 4), run_inputs)
