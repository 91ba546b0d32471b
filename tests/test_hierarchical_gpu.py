"""The hierarchical transport between GPUs beyond the conformance suite. EPCOMM_TEST_NVSHMEM says
how NVSHMEM moves the bytes; tests/softnic/README.md has the modes. Without a GPU:
tests/test_simulated.py."""

import signal
import time
from typing import Any

import pytest
import torch

import launcher
import rdma_modes
from epcomm import _core, nvshmem
from soak_calls import SEED, calls, run_calls
from test_gpu_calls import run_graph, run_lost_peer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.rdma,
    pytest.mark.skipif(
        not nvshmem.built_transports(), reason=f"no NVSHMEM in this build: {_core.nvshmem_status}"
    ),
]
NODES = pytest.mark.parametrize("ranks_per_node", [1, 2, 3])


def run_graphs(group: Any, ranks_per_node: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPCOMM_RANKS_PER_NODE", str(ranks_per_node))
        for layout in ("token", "expert", "padded"):
            run_graph(group, layout, "hierarchical")


@NODES
def test_graph(ranks_per_node: int) -> None:
    pool = launcher.pool("rdma")
    pool.run(pool.size, run_graphs, ranks_per_node, timeout=240.0)


@NODES
def test_random_calls(ranks_per_node: int) -> None:
    pool = launcher.pool("rdma")
    count = calls(200, 10_000)
    chunks = [{"chunk_tokens": n} for n in (1, 7, 64)]
    args = ("cuda", "hierarchical", chunks, ((256, 600), (1040, 77)), count, SEED, ranks_per_node)
    assert pool.run(pool.size, run_calls, *args, timeout=60.0 + 0.5 * count) == [count] * pool.size


def run_large(group: Any, ranks_per_node: int) -> None:
    """Whole batches of wide rows: every rank returns its input, weighted; replayed."""
    import epcomm

    arguments: dict[str, Any] = {"num_experts": 64, "hidden": 7168, "topk": 8, "max_tokens": 4096}
    with epcomm.Buffer(
        group,
        transport="hierarchical",
        ranks_per_node=ranks_per_node,
        window_bytes=1 << 30,
        **arguments,
    ) as buf:
        rng = torch.Generator(device="cuda").manual_seed(buf.rank)
        idx = torch.rand(4096, 64, device="cuda", generator=rng).topk(8).indices
        weights = torch.full((4096, 8), 0.25, device="cuda")
        recv = None
        for _ in range(20):
            x = torch.randint(-8, 9, (4096, 7168), device="cuda", generator=rng).bfloat16()
            recv = buf.dispatch(x, idx) if recv is None else buf.dispatch(x, plan=recv.plan)
            y = buf.combine(recv.x, recv.plan, topk_weights=weights)
            assert torch.equal(y, 2 * x)


@NODES
def test_large(ranks_per_node: int) -> None:
    pool = launcher.pool("rdma")
    pool.run(pool.size, run_large, ranks_per_node)


# Memory shared by CUDA IPC, as softnic does, goes with its owner: what is put there is undefined.
@pytest.mark.skipif(rdma_modes.MODE != "peer", reason="memory goes with its owner")
@pytest.mark.parametrize("ranks_per_node", [1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_peer(how: signal.Signals, ranks_per_node: int) -> None:
    size = launcher.nvshmem_ranks(4)
    if size < 2:
        pytest.skip("needs two ranks")
    with launcher.spawn(
        size,
        run_lost_peer,
        "hierarchical",
        600,
        True,
        device="rdma",
        env={"EPCOMM_RANKS_PER_NODE": str(ranks_per_node)},
    ) as ranks:
        for r in range(size):
            assert ranks.hear(r, 120.0) == "ready"
        ranks.signal(size - 1, how)
        time.sleep(0.2)
        for r in range(size - 1):
            ranks.tell(r)
        for rank, operation, _, seconds, _ in ranks.results(range(size - 1)):
            assert rank == size - 1
            assert operation in ("route", "dispatch")
            assert seconds < 5.0
        if how == signal.SIGSTOP:
            ranks.signal(size - 1, signal.SIGCONT)
