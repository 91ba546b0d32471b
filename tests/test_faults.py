"""Ranks that die, stall or come late: the others are told in time, and nothing is left behind."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import launcher

TIMEOUT_S = 2.0
SLACK_S = 1.0
NUM_RANKS = 4
VICTIM = 2
SURVIVORS = [r for r in range(NUM_RANKS) if r != VICTIM]
WARM_UPS = 3
# Options of each transport: of the four ranks, two by two form nodes, and rows go in many chunks.
TRANSPORTS: dict[str, dict[str, Any]] = {
    "cpu": {"transport": "cpu"},
    "hierarchical": {
        "transport": "hierarchical",
        "ranks_per_node": 2,
        "transport_options": {"chunk_tokens": 16},
    },
}
every_transport = pytest.mark.parametrize("transport", TRANSPORTS)


class Setup:
    """A small Buffer with short patience; every payload value names its rank."""

    def __init__(self, group: Any, hidden: int = 256, max_tokens: int = 64, **options: Any):
        import epcomm

        self.buf = epcomm.Buffer(
            group,
            num_experts=8,
            hidden=hidden,
            topk=2,
            max_tokens=max_tokens,
            **(TRANSPORTS["cpu"] | {"timeout": TIMEOUT_S} | options),
        )
        self.tokens = max_tokens
        self.x = torch.full((max_tokens, hidden), float(group.rank()), dtype=torch.bfloat16)
        self.idx = torch.arange(2 * max_tokens).reshape(max_tokens, 2) % 8
        self.recv: Any = None

    def dispatch(self) -> Any:
        self.recv = self.buf.dispatch(self.x, self.idx)
        return self.recv

    def combine(self) -> torch.Tensor:
        return self.buf.combine(self.recv.x, self.recv.plan)

    def check(self) -> None:
        """One round trip: every token comes back once from each rank that it went to."""
        self.dispatch()
        y = self.combine()
        owners = self.idx // -(-8 // self.buf.num_ranks)
        copies = 1 + (owners[:, 0] != owners[:, 1]).float()
        assert torch.equal(y.float(), self.x.float() * copies[:, None])


def fault(call: Callable[[], Any]) -> dict[str, Any]:
    """What the call raised, and when (on the clock that all processes share)."""
    import epcomm

    began = time.monotonic()
    try:
        call()
    except epcomm.Error as error:
        fields = {name: v for name, v in vars(error).items() if not name.startswith("_")}
        told = {"type": type(error).__name__, "text": str(error), **fields}
    except Exception as error:
        told = {"type": type(error).__name__, "text": str(error)}
    else:
        told = {"type": "nothing", "text": ""}
    return told | {"began": began, "ended": time.monotonic()}


def check_lost(told: dict[str, Any], since: float, operations: tuple[str, ...]) -> None:
    assert told["type"] == "PeerLost", told
    assert told["rank"] == VICTIM, told
    assert told["operation"] in operations, told
    assert told["ended"] - since < TIMEOUT_S + SLACK_S, told
    for word in (f"rank {VICTIM}", told["operation"], str(told["epoch"])):
        assert word in told["text"], told


def carry_on(survivors: Any, transport: str = "cpu") -> None:
    """After a fault: a new Buffer over the ranks that are left works."""
    setup = Setup(survivors, **TRANSPORTS[transport])
    for _ in range(3):
        setup.check()
    setup.buf.destroy()


@contextmanager
def spawned(folder: Path, num_ranks: int, fn: Any, *args: Any) -> Iterator[launcher.Ranks]:
    """Fresh ranks whose temporary folder is `folder`; afterwards looks for what they left."""
    before = set(os.listdir("/dev/shm"))
    with launcher.spawn(num_ranks, fn, *args, env={"TMPDIR": str(folder)}) as ranks:
        yield ranks
    assert list(folder.iterdir()) == []
    # Other programs of this machine come and go there, too; what stays is a leak.
    for _ in range(20):
        left = set(os.listdir("/dev/shm")) - before
        if not left:
            break
        time.sleep(0.1)
    assert not left
    sockets = Path("/proc/net/unix").read_text()
    assert not [pid for pid in ranks.pids if f"epcomm-{pid}-" in sockets]


# A rank dies before or in an operation that the others are in.


def lose_peer(
    group: Any, parent: launcher.Parent, transport: str, operation: str, how: str, timeout: float
) -> Any:
    survivors = dist.new_group(SURVIVORS)
    setup = Setup(group, timeout=timeout, **TRANSPORTS[transport])
    for _ in range(WARM_UPS):
        setup.check()
    held = setup.dispatch().x
    copy = held.clone()
    call = getattr(setup, operation)
    if group.rank() == VICTIM:
        parent.tell()
        parent.ask()
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return fault(call)
    parent.tell()
    told = fault(call)
    parent.tell(told)
    # Nobody leaves before all have seen the fault, or they would report each other.
    parent.ask()
    again = fault(call)
    assert again["type"] == "PeerLost" and again["ended"] - again["began"] < SLACK_S, again
    assert torch.equal(held, copy)
    setup.buf.destroy()
    carry_on(survivors, transport)
    return told


@every_transport
@pytest.mark.parametrize("timeout", [TIMEOUT_S, 60.0], ids=["impatient", "patient"])
@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_rank_killed(operation: str, timeout: float, transport: str, tmp_path: Path) -> None:
    """The end of a process is noticed as such: even with a long timeout nobody waits for it."""
    with spawned(tmp_path, NUM_RANKS, lose_peer, transport, operation, "kill", timeout) as ranks:
        for rank in range(NUM_RANKS):
            ranks.hear(rank)
        time.sleep(0.3)  # the others are in the operation now
        killed = time.monotonic()
        ranks.kill(VICTIM)
        told = [ranks.hear(rank) for rank in SURVIVORS]
        for one in told:
            names = ("route", "dispatch") if operation == "dispatch" else ("combine",)
            check_lost(one, killed, names)
            assert one["began"] < killed
        assert len({one["epoch"] for one in told}) == 1
        assert told[0]["epoch"] > WARM_UPS
        for rank in SURVIVORS:
            ranks.tell(rank)
        ranks.results(SURVIVORS)
        assert ranks.exit_codes(SURVIVORS, timeout=5.0) == [0] * len(SURVIVORS)


@every_transport
@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_rank_stopped_then_resumed(operation: str, transport: str, tmp_path: Path) -> None:
    """The others give it up after the timeout; when it wakes, it learns so and may not go on."""
    with spawned(tmp_path, NUM_RANKS, lose_peer, transport, operation, "stop", TIMEOUT_S) as ranks:
        for rank in range(NUM_RANKS):
            ranks.hear(rank)
        ranks.tell(VICTIM)
        stopped = time.monotonic()
        told = [ranks.hear(rank) for rank in SURVIVORS]
        for one in told:
            names = ("route", "dispatch") if operation == "dispatch" else ("combine",)
            check_lost(one, max(stopped, one["began"]), names)
        assert max(one["ended"] - one["began"] for one in told) > TIMEOUT_S - 0.5
        ranks.signal(VICTIM, signal.SIGCONT)
        evicted = ranks.results([VICTIM])[0]
        assert evicted["type"] == "Evicted", evicted
        assert evicted["by_rank"] in SURVIVORS
        assert evicted["operation"] == told[0]["operation"]
        assert evicted["epoch"] == told[0]["epoch"]
        for rank in SURVIVORS:
            ranks.tell(rank)
        ranks.results(SURVIVORS)


def storm(group: Any, parent: launcher.Parent, transport: str) -> Any:
    survivors = dist.new_group(SURVIVORS)
    setup = Setup(group, hidden=2048, max_tokens=256, **TRANSPORTS[transport])
    held = [setup.dispatch().x for _ in range(3)]
    copies = [x.clone() for x in held]
    parent.tell()

    def work() -> None:
        while True:
            setup.dispatch()
            setup.combine()

    told = fault(work)
    if group.rank() != VICTIM:
        parent.tell(told)
        parent.ask()
        assert all(torch.equal(x, copy) for x, copy in zip(held, copies, strict=True))
        setup.buf.destroy()
        carry_on(survivors, transport)
    return told


# Transports, and how long until the signal.
STORMS = [("cpu", ms) for ms in range(20, 220, 20)] + [
    ("hierarchical", ms) for ms in range(30, 230, 40)
]


def check_storm(ranks: launcher.Ranks, number: int, delay_ms: int) -> None:
    """All ranks work without pause, so the signal meets any step of any call, rows half written."""
    for rank in range(NUM_RANKS):
        ranks.hear(rank)
    time.sleep(delay_ms / 1e3)
    since = time.monotonic()
    ranks.signal(VICTIM, number)
    for rank in SURVIVORS:
        check_lost(ranks.hear(rank), since, ("route", "dispatch", "combine"))
    if number == signal.SIGSTOP:
        ranks.signal(VICTIM, signal.SIGCONT)
        told = ranks.results([VICTIM])[0]
        assert told["type"] == "Evicted", told
    for rank in SURVIVORS:
        ranks.tell(rank)
    ranks.results(SURVIVORS)


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "delay_ms"), STORMS)
def test_rank_killed_anywhere(transport: str, delay_ms: int, tmp_path: Path) -> None:
    with spawned(tmp_path, NUM_RANKS, storm, transport) as ranks:
        check_storm(ranks, signal.SIGKILL, delay_ms)


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "delay_ms"), STORMS[::2])
def test_rank_stopped_anywhere(transport: str, delay_ms: int, tmp_path: Path) -> None:
    with spawned(tmp_path, NUM_RANKS, storm, transport) as ranks:
        check_storm(ranks, signal.SIGSTOP, delay_ms)


# A rank is lost while the Buffer is made.


def lose_peer_in_init(group: Any, parent: launcher.Parent, how: str) -> Any:
    survivors = dist.new_group(SURVIVORS)
    dist.barrier()
    parent.tell()
    if group.rank() == VICTIM:
        if how == "between":
            Setup(_DiesAtSecondExchange(group))
        parent.ask()
    told = fault(lambda: Setup(group))
    parent.tell(told)
    parent.ask()
    carry_on(survivors)
    return told


class _DiesAtSecondExchange:
    """A Bootstrap whose process is killed when the options are agreed and windows are not yet."""

    def __init__(self, group: Any):
        import epcomm

        self._inner, self._calls = epcomm.TorchBootstrap(group, TIMEOUT_S), 0
        self.rank, self.size = self._inner.rank, self._inner.size

    def all_gather(self, data: bytes) -> list[bytes]:
        self._calls += 1
        if self._calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._inner.all_gather(data)

    def barrier(self) -> None:
        self._inner.barrier()


@pytest.mark.parametrize("how", ["absent", "killed", "between"])
def test_rank_lost_in_init(how: str, tmp_path: Path) -> None:
    with spawned(tmp_path, NUM_RANKS, lose_peer_in_init, how) as ranks:
        since = time.monotonic()
        for rank in range(NUM_RANKS):
            ranks.hear(rank)
        if how == "killed":
            time.sleep(0.3)
            since = time.monotonic()
            ranks.kill(VICTIM)
        for rank in SURVIVORS:
            told = ranks.hear(rank)
            assert told["type"] == "PeerLost", told
            assert told["rank"] in (VICTIM, -1), told  # a process group need not know which
            assert told["operation"] == "init" and told["epoch"] == 0, told
            assert told["ended"] - max(since, told["began"]) < TIMEOUT_S + SLACK_S, told
        for rank in SURVIVORS:
            ranks.tell(rank)
        ranks.results(SURVIVORS)


def make_buffers(group: Any, parent: launcher.Parent) -> Any:
    parent.tell()

    def work() -> None:
        while True:
            Setup(group).buf.destroy()

    told = fault(work)
    parent.tell(told)
    parent.ask()
    return None


@pytest.mark.slow
@pytest.mark.parametrize("delay_ms", range(20, 140, 20))
def test_rank_killed_anywhere_in_init(delay_ms: int, tmp_path: Path) -> None:
    with spawned(tmp_path, NUM_RANKS, make_buffers) as ranks:
        for rank in range(NUM_RANKS):
            ranks.hear(rank)
        time.sleep(delay_ms / 1e3)
        killed = time.monotonic()
        ranks.kill(VICTIM)
        for rank in SURVIVORS:
            told = ranks.hear(rank)
            assert told["type"] == "PeerLost" and told["operation"] == "init", told
            assert told["ended"] - killed < TIMEOUT_S + SLACK_S, told
        for rank in SURVIVORS:
            ranks.tell(rank)
        ranks.results(SURVIVORS)


# A rank is late, but not too late.


def run_late(group: Any) -> None:
    setup = Setup(group)
    for operation in (setup.check, setup.dispatch, setup.combine):
        if group.rank() == 1:
            time.sleep(0.6 * TIMEOUT_S)
        operation()
    setup.buf.destroy()


def test_late_rank_is_waited_for() -> None:
    launcher.pool().run(3, run_late)


def run_destroyed_peer(group: Any) -> dict[str, Any]:
    setup = Setup(group, timeout=60.0)
    setup.check()
    if group.rank() == 1:
        assert len(setup.recv.x) > 0  # still held, and no sign of life for the peers
        setup.buf.destroy()
    told = fault(setup.dispatch)
    setup.buf.destroy()
    return told


def test_peer_that_destroyed_its_buffer() -> None:
    told = launcher.pool().run(3, run_destroyed_peer)
    assert told[1]["type"] == "BufferUnusable"
    for rank in (0, 2):
        assert told[rank]["type"] == "PeerLost" and told[rank]["rank"] == 1, told
        assert told[rank]["ended"] - told[rank]["began"] < SLACK_S


def run_with_child(group: Any, parent: launcher.Parent) -> dict[str, Any]:
    """Rank 1 forks a child, which outlives it and inherits its sockets."""
    setup = Setup(group, timeout=60.0)
    setup.check()
    if group.rank() == 1:
        child = os.fork()
        if child == 0:
            time.sleep(20.0)
            os._exit(0)
        parent.tell(child)
        time.sleep(60.0)
    parent.ask()
    return fault(setup.dispatch)


def test_killed_rank_whose_child_lives_on() -> None:
    with launcher.spawn(3, run_with_child) as ranks:
        child = ranks.hear(1)
        ranks.kill(1)
        for rank in (0, 2):
            ranks.tell(rank)
        for told in ranks.results((0, 2)):
            assert told["type"] == "PeerLost" and told["rank"] == 1, told
            assert told["ended"] - told["began"] < SLACK_S
        os.kill(child, signal.SIGKILL)


# Ranks leave.


def leave(group: Any, parent: launcher.Parent, how: str) -> None:
    setup = Setup(group)
    other = Setup(group)
    setup.check()
    other.check()
    globals()["_kept_until_exit"] = (setup, other)
    if how == "destroy":
        first, second = (setup, other) if group.rank() % 2 else (other, setup)
        first.buf.destroy()
        second.buf.destroy()
        second.buf.destroy()
    elif how == "exception":
        raise ValueError("a user's mistake")


@pytest.mark.parametrize("how", ["destroy", "nothing", "exception"])
def test_processes_leave(how: str, tmp_path: Path) -> None:
    """Exit takes no help: no destroy, another order on each rank, an exception in flight."""
    with spawned(tmp_path, 3, leave, how) as ranks:
        if how == "exception":
            with pytest.raises(launcher.RankFailed, match="a user's mistake"):
                ranks.results()
        else:
            ranks.results()
        assert ranks.exit_codes(range(3), timeout=5.0) == [0, 0, 0]
