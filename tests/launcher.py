"""Runs test functions on several ranks, one process each.

`pool(device).run(n, fn, ...)` uses processes that live as long as the test session; `spawn` starts
fresh ones for tests that kill, stop or poison them. Functions are module-level and get the process
group of their ranks as first argument. Processes come from a fork server that has imported torch,
so a fresh set costs milliseconds.
"""

import atexit
import gc
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
import unittest
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# Instead of the numbers of ranks that the conformance tests usually run with.
WANTED_RANKS = tuple(int(n) for n in os.environ.get("EPCOMM_TEST_RANKS", "").split(",") if n)
CPU_RANKS = max(7, *WANTED_RANKS, 0)
SIMULATED_RANKS = 4
# More than one: under MPS side by side, each on its share of the SMs; else slow, since they take
# turns. CONTRIBUTING.md has both.
RANKS_PER_GPU = int(os.environ.get("EPCOMM_TEST_RANKS_PER_GPU", "1"))
# Tools that watch every load and store make everything slow: how many times longer to wait.
PATIENCE = float(os.environ.get("EPCOMM_TEST_PATIENCE", "1"))
TIMEOUT_S = 20.0 * PATIENCE  # of Buffers that lose no rank
GROUP_TIMEOUT_S = 60.0 * PATIENCE
# A rank that fails leaves its peers waiting for it; this is how long they may take to say so.
GRACE_S = 3.0

# NCCL's way between hosts, on one machine.
OVER_LOOPBACK = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["numpy", "torch", "torch.distributed"])


class RankFailed(AssertionError):
    """A function failed on some rank; the text holds the remote traceback."""

    def __init__(self, rank: int, text: str):
        super().__init__(f"rank {rank} failed\n{text}")
        self.rank = rank

    def beside(self, outcomes: dict[int, "Outcome"]) -> "RankFailed":
        """The same, with the last line of what failed on other ranks."""
        for rank, outcome in sorted(outcomes.items()):
            if outcome.error and rank != self.rank:
                self.args = (f"{self}\nrank {rank}: {outcome.error.splitlines()[-1]}",)
        return self


@dataclass(frozen=True)
class Outcome:
    """How a function ended on one rank."""

    value: Any = None
    error: str = ""  # traceback, "" = it returned
    skip: str = ""


def _outcome(fn: Callable, args: tuple) -> Outcome:
    try:
        return Outcome(fn(*args))
    except unittest.SkipTest as skip:
        return Outcome(skip=str(skip))
    except Exception:
        return Outcome(error=traceback.format_exc())


def _join(rank: int, num_ranks: int, store: str, device: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what a transport takes may depend on it
    if device == "rdma":
        import rdma_modes

        rdma_modes.prepare(rank, num_ranks)
    if device in ("cuda", "rdma"):
        gpus = torch.cuda.device_count()
        torch.cuda.set_device(rank % gpus)
        # NCCL takes ranks of different ids for ranks of different machines, which have a GPU each.
        if hosts := int(os.environ.get("EPCOMM_TEST_HOSTS", "0")):
            os.environ["NCCL_HOSTID"] = f"host{rank * hosts // num_ranks}"
        elif RANKS_PER_GPU > 1:
            os.environ["NCCL_HOSTID"] = f"host{rank // gpus}"
            os.environ.update(OVER_LOOPBACK)
    if device == "simulated":
        import simulated

        simulated.install()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )
    if device == "rdma":
        rdma_modes.take_memory()
    gc.freeze()  # what torch has brought along need not be looked at in every collection


class _Processes:
    """A set of rank processes and the pipes to them."""

    def __init__(self, num_ranks: int, device: str, body: Callable, args: tuple):
        self.folder = tempfile.mkdtemp(prefix="epcomm-tests-")
        self.conns: list[Connection] = []
        self.processes = []
        store = os.path.join(self.folder, "store")
        for rank in range(num_ranks):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=body, args=(rank, num_ranks, store, device, theirs, *args), daemon=True
            )
            process.start()
            theirs.close()
            self.conns.append(ours)
            self.processes.append(process)

    def receive(self, ranks: Sequence[int], timeout: float) -> tuple[int, Any] | None:
        """The next message of any of these ranks, or None when time is up."""
        of = {self.conns[r]: r for r in ranks}
        ready = wait(list(of), timeout=max(0.0, timeout))
        if not ready:
            return None
        rank = of[ready[0]]
        try:
            return rank, ready[0].recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(5.0)
            code = self.processes[rank].exitcode
            return rank, Outcome(error=f"its process is gone, exit code {code}")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for conn, process in zip(self.conns, self.processes, strict=True):
            process.join(10.0)
            conn.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _pool_body(rank: int, num_ranks: int, store: str, device: str, conn: Connection) -> None:
    _join(rank, num_ranks, store, device)
    # Every member makes the groups in the same order, so they are made once, here.
    groups = {n: dist.new_group(list(range(n))) for n in range(1, num_ranks + 1)}
    while True:
        try:
            n, fn, args = conn.recv()
        except EOFError:
            break
        conn.send(_outcome(fn, (groups[n], *args)))
    dist.destroy_process_group()


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A cached subgroup. In a function that runs on all ranks of a pool, called by all of them."""
    key = tuple(ranks)
    if key not in _groups:
        _groups[key] = dist.new_group(list(ranks))
    return _groups[key]


def gpu_ranks(most: int | None = None) -> int:
    """How many ranks the GPUs of this machine take, and no more than `most`."""
    ranks = torch.cuda.device_count() * RANKS_PER_GPU
    return ranks if most is None else min(ranks, most)


def nvshmem_ranks(most: int) -> int:
    """The same of ranks of which each GPU has as many, as NVSHMEM wants it."""
    ranks, gpus = gpu_ranks(most), torch.cuda.device_count()
    return ranks if ranks <= gpus else ranks - ranks % gpus


class Pool:
    """Ranks that are started once. A failure that leaves ranks blocked restarts all of them.

    size: how many; if not given, CPU_RANKS, SIMULATED_RANKS or gpu_ranks().
    """

    def __init__(self, device: str, size: int | None = None):
        self.device = device
        usual = {"cpu": CPU_RANKS, "simulated": SIMULATED_RANKS}
        self.size = size or usual.get(device) or gpu_ranks()
        self._set: _Processes | None = None

    def run(self, num_ranks: int, fn: Callable, *args: Any, timeout: float = 120.0) -> list[Any]:
        """fn(group, *args) on the first num_ranks ranks; their results, or the first failure."""
        __tracebackhide__ = True  # what matters is the traceback of the rank
        timeout *= PATIENCE
        if self._set is None:
            self._set = _Processes(self.size, self.device, _pool_body, ())
        for conn in self._set.conns[:num_ranks]:
            conn.send((num_ranks, fn, args))
        deadline = time.monotonic() + timeout
        outcomes: dict[int, Outcome] = {}
        failed: RankFailed | None = None
        while len(outcomes) < num_ranks:
            pending = [r for r in range(num_ranks) if r not in outcomes]
            message = self._set.receive(pending, deadline - time.monotonic())
            if message is None:
                self.kill()
                raise failed or RankFailed(pending[0], f"no answer in {timeout} s from {pending}")
            rank, outcome = message
            outcomes[rank] = outcome
            if outcome.error and failed is None:
                failed = RankFailed(rank, outcome.error)
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if failed:
            self.kill()
            raise failed.beside(outcomes)
        for outcome in outcomes.values():
            if outcome.skip:
                raise unittest.SkipTest(outcome.skip)
        return [outcomes[r].value for r in range(num_ranks)]

    def kill(self) -> None:
        if self._set is not None:
            self._set.kill()
            self._set = None


_pools: dict[str, Pool] = {}


def pool(device: str = "cpu") -> Pool:
    if device not in _pools:
        _pools[device] = Pool(device)
    return _pools[device]


@atexit.register
def close_pools() -> None:
    """Ends all processes of all pools."""
    for some in _pools.values():
        some.kill()


@dataclass(frozen=True)
class Message:
    value: Any


class Parent:
    """What a spawned rank talks to its test with."""

    def __init__(self, conn: Connection):
        self._conn = conn

    def tell(self, value: Any = None) -> None:
        self._conn.send(Message(value))

    def ask(self, timeout: float = 60.0) -> Any:
        """Waits for Ranks.tell."""
        if not self._conn.poll(timeout):
            raise TimeoutError("the test said nothing")
        return self._conn.recv()


def _spawn_body(
    rank: int,
    num_ranks: int,
    store: str,
    device: str,
    conn: Connection,
    env: dict[str, str],
    fn: Callable,
    args: tuple,
) -> None:
    os.environ.update(env)
    tempfile.tempdir = None
    _join(rank, num_ranks, store, device)
    conn.send(_outcome(fn, (dist.group.WORLD, Parent(conn), *args)))


class Ranks:
    """Fresh processes, each running fn(group, parent, *args) once; ended when `with` is left."""

    def __init__(self, set_: _Processes):
        self._set = set_
        self.num_ranks = len(set_.processes)
        self.pids = [process.pid for process in set_.processes]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exc: object) -> None:
        self._set.kill()

    def signal(self, rank: int, number: int) -> None:
        pid = self.pids[rank]
        assert pid is not None
        os.kill(pid, number)

    def kill(self, rank: int) -> None:
        self.signal(rank, signal.SIGKILL)
        self._set.processes[rank].join(10.0)

    def tell(self, rank: int, value: Any = None) -> None:
        self._set.conns[rank].send(value)

    def hear(self, rank: int, timeout: float = 60.0) -> Any:
        """The next Parent.tell of a rank."""
        message = self._set.receive([rank], timeout)
        if message is None:
            raise RankFailed(rank, f"no message in {timeout} s")
        if isinstance(message[1], Message):
            return message[1].value
        raise RankFailed(rank, message[1].error or "it ended before it said anything")

    def results(self, ranks: Sequence[int] | None = None, timeout: float = 60.0) -> list[Any]:
        """What fn returned on these ranks; raises the first failure."""
        __tracebackhide__ = True
        ranks = list(range(self.num_ranks)) if ranks is None else list(ranks)
        deadline = time.monotonic() + timeout
        values: dict[int, Any] = {}
        while len(values) < len(ranks):
            pending = [r for r in ranks if r not in values]
            message = self._set.receive(pending, deadline - time.monotonic())
            if message is None:
                raise RankFailed(pending[0], f"no answer in {timeout} s from {pending}")
            rank, outcome = message
            if isinstance(outcome, Message):
                raise RankFailed(rank, f"said {outcome.value!r} when its result was expected")
            if outcome.error:
                raise RankFailed(rank, outcome.error)
            values[rank] = outcome.value
        return [values[r] for r in ranks]

    def exit_codes(self, ranks: Sequence[int], timeout: float = 10.0) -> list[int | None]:
        """Exit codes once the processes are gone; None where one still runs after timeout."""
        deadline = time.monotonic() + timeout
        for rank in ranks:
            self._set.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self._set.processes[r].exitcode for r in ranks]


def spawn(
    num_ranks: int,
    fn: Callable,
    *args: Any,
    device: str = "cpu",
    env: dict[str, str] | None = None,
) -> Ranks:
    return Ranks(_Processes(num_ranks, device, _spawn_body, (env or {}, fn, args)))
