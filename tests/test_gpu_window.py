"""Windows in device memory, and torch's tensors in them, on real GPUs.

Peers write with the CUDA driver's own fill (cuMemsetD32), so nothing here depends on a transport.
"""

import ctypes
import gc
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import launcher
from launcher import TIMEOUT_S

pytestmark = pytest.mark.gpu

MIB = 1 << 20
WORDS = 1024  # that each rank writes into each window


def cuda() -> Any:
    from epcomm import native

    module = native.load_cuda()
    assert module is not None
    return module


def memory_of(group: Any, bytes_: int = 8 * MIB) -> Any:
    from epcomm.bootstrap import TorchBootstrap

    return cuda().SymmetricMemory(TorchBootstrap(group, TIMEOUT_S), bytes_, TIMEOUT_S)


def fill(address: int, value: int, words: int = WORDS) -> None:
    """Stores from this GPU, through this process's mapping."""
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuMemsetD32_v2(
        ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_size_t(words)
    )
    assert code == 0
    torch.cuda.synchronize()


def own_words(memory: Any, rank: int) -> torch.Tensor:
    from epcomm.symmetric import _DevicePiece

    piece = SimpleNamespace(bytes=memory.bytes, address=memory.peer(rank))
    return torch.as_tensor(_DevicePiece(piece), device="cuda").view(torch.int32)


def check_marks(group: Any, memory: Any, mark: int = 0) -> None:
    """Every rank writes its mark into every window, and finds all marks in its own."""
    rank, size = group.rank(), group.size()
    mine = own_words(memory, rank)
    for peer in range(size):
        assert memory.alive(peer)
        fill(memory.peer(peer) + rank * WORDS * 4, 1000 * mark + rank + 1)
    dist.barrier(group)
    expected = torch.arange(1, size + 1, dtype=torch.int32).repeat_interleave(WORDS) + 1000 * mark
    assert torch.equal(mine[: size * WORDS].cpu(), expected)
    assert not mine[size * WORDS :].any()
    dist.barrier(group)


def run_marks(group: Any) -> tuple[str, int]:
    memory = memory_of(group)
    assert not own_words(memory, group.rank()).any()
    dist.barrier(group)
    check_marks(group, memory)
    return memory.share, memory.bytes


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_peers_write_into_the_window(ranks: int) -> None:
    pool = launcher.pool("cuda")
    if pool.size < ranks:
        pytest.skip(f"this machine has {pool.size} GPUs")
    told = pool.run(ranks, run_marks)
    assert told == [told[0]] * ranks
    assert told[0][1] == 8 * MIB


def run_access(group: Any) -> str:
    from epcomm.bootstrap import TorchBootstrap

    return str(cuda().check_peer_access(TorchBootstrap(group, TIMEOUT_S), TIMEOUT_S).text)


def test_this_machine_has_peer_access() -> None:
    """Or the tests of this file cannot pass: says what is missing."""
    pool = launcher.pool("cuda")
    assert pool.run(pool.size, run_access) == [""] * pool.size


# Which GPUs a process sees.


def run_with_visible(group: Any, parent: Any, visible: list[str], ordinals: list[int]) -> Any:
    rank = group.rank()
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank]
    torch.cuda.set_device(ordinals[rank])
    text = run_access(group)
    return text, None if text else run_marks(group)


def uuids() -> list[str]:
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(2)]


def run_uuids(group: Any) -> list[str]:
    return uuids()


@pytest.mark.parametrize("case", ["permuted", "masked", "uuid", "uuid_masked"])
def test_visible_devices(case: str) -> None:
    pool = launcher.pool("cuda")
    if pool.size < 2:
        pytest.skip("needs 2 GPUs")
    names = pool.run(1, run_uuids)[0]
    visible, ordinals = {
        "permuted": (["0,1", "1,0"], [0, 0]),
        "masked": (["1", "0"], [0, 0]),
        "uuid": ([",".join(names), ",".join(reversed(names))], [1, 1]),
        "uuid_masked": (names, [0, 0]),
    }[case]
    with launcher.spawn(2, run_with_visible, visible, ordinals) as ranks:
        for text, told in ranks.results(timeout=120):
            assert text == "" and told[1] == 8 * MIB


def test_two_ranks_on_one_gpu() -> None:
    with launcher.spawn(2, run_with_visible, ["0", "0"], [0, 0]) as ranks:
        for text, _ in ranks.results(timeout=120):
            assert "rank 0 -> rank 1: both ranks use the same GPU GPU-" in text


# Lifetimes.


def run_several(group: Any) -> None:
    """Windows of the whole group and of pairs, at once and in any order of their ends."""
    size, rank = group.size(), group.rank()
    whole = [memory_of(group) for _ in range(3)]
    pairs = [launcher.group_of((r, (r + 1) % size)) for r in range(size if size > 2 else 1)]
    subgroups = [pair for pair in pairs if dist.get_rank(pair) >= 0]
    # Neighbours make their windows in the order of the pairs, which all ranks share.
    parts = [memory_of(pair) for pair in subgroups]
    for mark, memory in enumerate(whole):
        check_marks(group, memory, mark)
    for mark, (pair, memory) in enumerate(zip(subgroups, parts, strict=True)):
        check_marks(pair, memory, 10 + mark)
    del whole[rank % 3 :: 2], memory
    gc.collect()
    dist.barrier(group)


def test_several_windows_and_subgroups() -> None:
    pool = launcher.pool("cuda")
    if pool.size < 2:
        pytest.skip("needs 2 GPUs")
    pool.run(pool.size, run_several)


def run_cycles(group: Any, cycles: int) -> tuple[Any, Any]:
    def holdings() -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        dist.barrier(group)  # peers' mappings keep memory, too
        return torch.cuda.mem_get_info()[0], len(os.listdir("/proc/self/fd"))

    before = None
    for cycle in range(cycles + 3):
        memory = memory_of(group, 64 * MIB)
        fill(memory.peer((group.rank() + 1) % group.size()), cycle + 1)
        dist.barrier(group)
        assert int(own_words(memory, group.rank())[0]) == cycle + 1
        dist.barrier(group)
        del memory
        if cycle == 2:
            before = holdings()
    return before, holdings()


def test_many_windows_leave_nothing() -> None:
    pool = launcher.pool("cuda")
    for before, after in pool.run(pool.size, run_cycles, 200, timeout=300):
        assert abs(before[0] - after[0]) < MIB
        assert before[1] == after[1]


def run_killed(group: Any, parent: Any) -> str:
    rank = group.rank()
    free_before = torch.cuda.mem_get_info(1)[0]
    dist.barrier(group)
    memory = memory_of(group, 1024 * MIB)
    parent.tell()
    if rank == 1:
        time.sleep(60)
    end = time.monotonic() + 5
    while memory.alive(1) and time.monotonic() < end:
        time.sleep(0.001)
    assert not memory.alive(1)
    fill(memory.peer(1), 7)  # its memory stays as long as it is mapped here
    del memory
    # The killed process's memory, context included, is back once nobody maps it.
    end = time.monotonic() + 5
    while torch.cuda.mem_get_info(1)[0] < free_before and time.monotonic() < end:
        time.sleep(0.01)
    assert torch.cuda.mem_get_info(1)[0] >= free_before
    return "saw it"


def test_killed_process_leaves_nothing() -> None:
    if launcher.pool("cuda").size < 2:
        pytest.skip("needs 2 GPUs")

    def names() -> set[str]:
        return {str(p) for folder in ("/dev/shm", "/tmp") for p in Path(folder).glob("*epcomm*")}

    with launcher.spawn(2, run_killed, device="cuda") as ranks:
        before = names()
        for rank in range(2):
            ranks.hear(rank)
        ranks.kill(1)
        assert ranks.results([0]) == ["saw it"]
        assert names() == before


# Tensors.


def tensors_in(memory: Any) -> Any:
    from epcomm.symmetric import PoolTensors

    return PoolTensors(memory, cuda(), torch.device("cuda", torch.cuda.current_device()))


def inside(memory: Any, rank: int, tensor: torch.Tensor) -> bool:
    begin = memory.peer(rank)
    return begin <= tensor.data_ptr() and (
        tensor.data_ptr() + tensor.nbytes <= begin + memory.bytes
    )


def make(tensors: Any, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    made = tensors.make([(torch.int32, shape) for shape in shapes])
    assert made is not None
    return list(made)


def run_tensors(group: Any) -> None:
    """Peers write straight into ordinary tensors; other tensors stay outside the window."""
    rank, size = group.rank(), group.size()
    memory = memory_of(group, 256 * MIB)
    tensors = tensors_in(memory)
    held = []
    for call in range(20):
        x, small, none = make(tensors, (size, 1 << 20), (16,), (0, 4))
        assert inside(memory, rank, x) and inside(memory, rank, small) and none.shape == (0, 4)
        assert not inside(memory, rank, torch.empty(1 << 20, device="cuda"))
        x.fill_(-1)
        offset = torch.tensor([x.data_ptr() - memory.peer(rank)])
        offsets = [torch.empty_like(offset) for _ in range(size)]
        torch.cuda.synchronize()
        dist.all_gather(offsets, offset, group=group)
        for peer in range(size):
            fill(
                memory.peer(peer) + int(offsets[peer]) + rank * (4 << 20),
                call * 100 + rank,
                1 << 20,
            )
        dist.barrier(group)
        expected = torch.arange(size, dtype=torch.int32, device="cuda")[:, None] + call * 100
        assert bool((x == expected).all())
        held = [*held[-2:], (x, expected)]
        assert all(bool((a == b).all()) for a, b in held)
        dist.barrier(group)


def test_tensors() -> None:
    pool = launcher.pool("cuda")
    pool.run(pool.size, run_tensors)


def run_in_settings(group: Any, parent: Any) -> None:
    run_marks(group)
    run_tensors(group)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments(name: str) -> None:
    ranks = min(2, launcher.pool("cuda").size)
    env = {name: "expandable_segments:True"}
    with launcher.spawn(ranks, run_in_settings, device="cuda", env=env) as spawned:
        spawned.results(timeout=120)


def run_streams(group: Any) -> None:
    """Memory is used again at once on its own stream, but not before record_stream's are done."""
    tensors = tensors_in(memory_of(group, 64 * MIB))
    shape = (2 << 20,)
    (x,) = make(tensors, shape)
    address = x.data_ptr()
    del x
    (x,) = make(tensors, shape)
    assert x.data_ptr() == address
    side = torch.cuda.Stream()
    for trial in range(20):
        (x,) = make(tensors, shape)
        x.fill_(trial)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            copy = x.clone()
        x.record_stream(side)
        used = x.data_ptr()
        del x
        torch.empty(1, device="cuda")  # where torch looks for what is done
        (y,) = make(tensors, shape)
        assert y.data_ptr() != used
        y.fill_(-1)
        del y
        side.synchronize()
        assert bool((copy == trial).all())


def test_streams() -> None:
    launcher.pool("cuda").run(1, run_streams)


def run_full(group: Any) -> None:
    """Full: None, and no more; what is dropped is room again, also for other sizes."""
    memory = memory_of(group, 64 * MIB)
    tensors = tensors_in(memory)
    # torch asks for segments of 20 MiB for tensors below 10 MiB, and of even MiB above.
    for mib, fit in ((8, 6), (20, 3), (12, 5), (30, 2)):
        held = []
        while (made := tensors.make([(torch.uint8, (mib * MIB,))])) is not None:
            made[0].fill_(len(held))
            held.append(made[0])
        assert len(held) == fit
        assert all(bool((t == i).all()) for i, t in enumerate(held))
        assert memory.free_bytes < mib * MIB
        del held, made
    torch.empty(16, device="cuda")  # torch's own memory is as usable as before


def test_full_window() -> None:
    launcher.pool("cuda").run(1, run_full)


def run_outlive(group: Any) -> None:
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    memory = memory_of(group, 256 * MIB)
    tensors = tensors_in(memory)
    (x,) = make(tensors, (1 << 20,))
    x.fill_(5)
    tensors.close()
    del tensors, memory
    gc.collect()
    assert bool((x == 5).all())
    x.add_(1)
    assert int(x.sum()) == 6 << 20
    assert torch.cuda.mem_get_info()[0] <= before - 256 * MIB
    del x
    torch.cuda.empty_cache()
    dist.barrier(group)
    assert abs(torch.cuda.mem_get_info()[0] - before) <= 2 * MIB


def test_tensors_outlive_the_window() -> None:
    pool = launcher.pool("cuda")
    pool.run(pool.size, run_outlive)


def run_graph(group: Any) -> None:
    """Captured memory lies in the window and stays reserved for as long as the graph lives."""
    memory = memory_of(group, 64 * MIB)
    tensors = tensors_in(memory)
    rank = group.rank()
    room = memory.free_bytes
    source = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")
    out = torch.empty_like(source)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (x,) = make(tensors, (1 << 20,))
        assert inside(memory, rank, x)
        x.copy_(source)
        (y,) = make(tensors, (1 << 20,))
        assert y.data_ptr() != x.data_ptr()
        y.copy_(x + 1)
        out.copy_(y)
        del x, y
    assert memory.free_bytes == room - 8 * MIB
    for replay in range(5):
        (other,) = make(tensors, (1 << 20,))
        other.fill_(-1)
        source.fill_(replay)
        graph.replay()
        assert bool((out == replay + 1).all()) and bool((other == -1).all())
        del other
    del graph
    gc.collect()
    torch.cuda.synchronize()
    end = time.monotonic() + 5
    tensors.close()
    while memory.free_bytes != room and time.monotonic() < end:
        cuda().release_uncaptured()
        time.sleep(0.01)
    assert memory.free_bytes == room


def test_graph_capture() -> None:
    launcher.pool("cuda").run(1, run_graph)


def run_cost(group: Any) -> float:
    tensors = tensors_in(memory_of(group, 512 * MIB))
    wanted = [(torch.bfloat16, (4096, 7168)), (torch.uint8, (4096 * 112,))]
    times = []
    for _ in range(1000):
        start = time.perf_counter()
        made = tensors.make(wanted)
        times.append(time.perf_counter() - start)
        assert made is not None
        del made
    return sorted(times)[len(times) // 2] * 1e6


def test_tensors_cost_little() -> None:
    """Host time of both tensors of a dispatch, in microseconds; the aim is 10."""
    assert launcher.pool("cuda").run(1, run_cost)[0] < 25
