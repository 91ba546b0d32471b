"""The rdma transport beyond the conformance suite, on GPUs. EPCOMM_TEST_NVSHMEM says how NVSHMEM
moves the bytes; tests/softnic/README.md has the modes. Without a GPU: tests/test_simulated.py."""

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import launcher
import rdma_modes
from epcomm import _core, nvshmem
from soak_calls import calls, run_calls
from test_gpu_calls import batch, check_round_trip, make, run_bad_id, run_graph, run_lost_peer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.rdma,
    pytest.mark.skipif(
        not nvshmem.built_transports(), reason=f"no rdma in this build: {_core.nvshmem_status}"
    ),
]
only_peer = pytest.mark.skipif(rdma_modes.MODE != "peer", reason="says nothing about the way")


@pytest.mark.parametrize("layout", ["token", "expert", "padded"])
def test_graph(layout: str) -> None:
    pool = launcher.pool("rdma")
    pool.run(pool.size, run_graph, layout, "rdma", timeout=240.0)


def test_bad_expert_id() -> None:
    pool = launcher.pool("rdma")
    pool.run(min(pool.size, 4), run_bad_id, "rdma", 256)


def test_random_calls() -> None:
    pool = launcher.pool("rdma")
    count = calls(200, 10_000)
    args = ("cuda", "rdma", [{}], ((256, 256), (1040, 77), (7168, 32)), count)
    assert pool.run(pool.size, run_calls, *args, timeout=60.0 + 0.5 * count) == [count] * pool.size


def run_counted(group: Any) -> tuple[int, list[int]]:
    before = rdma_modes.card_counts()
    with make(group, "rdma", max_tokens=8) as buf:
        x, idx, weights = batch(buf.rank, 8)
        recv = buf.dispatch(x, idx, weights)
        buf.combine(recv.x, recv.plan, topk_weights=weights)
        torch.cuda.synchronize()
    after = rdma_modes.card_counts()
    return buf.num_ranks, [b - a for a, b in zip(before, after, strict=True)]


@pytest.mark.skipif(rdma_modes.MODE == "peer", reason="no network card in this mode")
def test_the_card_is_used() -> None:
    pool = launcher.pool("rdma")
    for ranks, (rma, amo, _, quiet) in pool.run(pool.size, run_counted):
        if rdma_modes.MODE == "card":
            # At least an entry to each other rank in every kernel, each with a signal.
            assert rma >= 3 * (ranks - 1) and amo >= 3 * (ranks - 1)
        assert rma > 0 and amo > 0 and quiet > 0


def run_subgroups(group: Any) -> None:
    """Buffers over parts of the job, beside one over all of it, made and ended in any order."""
    from epcomm import Buffer

    everyone = make(group, "rdma", max_tokens=16)
    size, rank = group.size(), group.rank()
    parts = [list(range(r, size, 2)) for r in range(2)] if size > 2 else [[0], [1]]
    groups = [launcher.group_of(part) for part in parts]
    mine = next(g for g, part in zip(groups, parts, strict=True) if rank in part)
    for seed in range(6):
        part: Buffer = make(mine, "rdma", max_tokens=16)
        for buf in (everyone, part, everyone):
            x, idx, weights = batch(100 * seed + rank, 16)
            recv = buf.dispatch(x, idx, weights)
            check_round_trip(x, idx, weights, buf.combine(recv.x, recv.plan, topk_weights=weights))
        part.destroy()
        if seed % 2 == 0:
            everyone.destroy()
            everyone = make(group, "rdma", max_tokens=16)
    everyone.destroy()


def test_subgroups() -> None:
    pool = launcher.pool("rdma")
    if pool.size < 2:
        pytest.skip("needs two GPUs")
    pool.run(pool.size, run_subgroups)


def run_first_over_one(group: Any, parent: launcher.Parent) -> str:
    """NVSHMEM is initialised over the group of the first Buffer, and only once."""
    alone = [dist.new_group([r]) for r in range(group.size())][group.rank()]
    from epcomm import Error

    if group.rank() == 0:
        make(alone, "rdma", max_tokens=8).destroy()
    try:
        make(group, "rdma", max_tokens=8)
    except Error as error:
        return str(error)
    return ""


@only_peer
def test_the_first_buffer_decides_who_takes_part() -> None:
    if launcher.gpu_ranks() < 2:
        pytest.skip("needs two ranks")
    env = {**rdma_modes._ALWAYS, **rdma_modes.MODES["peer"]}
    with launcher.spawn(2, run_first_over_one, device="cuda", env=env) as ranks:
        texts = ranks.results()
    assert texts[0] == texts[1] and "make the first Buffer of transport rdma over all" in texts[0]


def run_exit(group: Any, parent: launcher.Parent) -> None:
    buf = make(group, "rdma", max_tokens=8)
    x, idx, weights = batch(buf.rank, 8)
    recv = buf.dispatch(x, idx, weights)
    buf.combine(recv.x, recv.plan)
    torch.cuda.synchronize()


def test_processes_end() -> None:
    """NVSHMEM is never finalised; processes end all the same."""
    size = launcher.gpu_ranks(2)
    with launcher.spawn(size, run_exit, device="rdma") as ranks:
        ranks.results(timeout=120.0)
        assert ranks.exit_codes(range(size), timeout=15.0) == [0] * size


# Memory shared by CUDA IPC, as softnic does, goes with its owner: what is put there is undefined.
@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGKILL, marks=only_peer), pytest.param(signal.SIGSTOP)]
)
@pytest.mark.parametrize("host_sync", [True, False])
def test_lost_peer(host_sync: bool, how: signal.Signals) -> None:
    size = launcher.nvshmem_ranks(4)
    if size < 2:
        pytest.skip("needs two ranks")
    with launcher.spawn(size, run_lost_peer, "rdma", 256, host_sync, device="rdma") as ranks:
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
            os.kill(ranks.pids[-1], signal.SIGCONT)
