"""Windows that are full, and what a process holds when its Buffers are gone."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher
from test_faults import Setup, fault

# The window is full.

WINDOW_BYTES = 1 << 20


def run_window_full(group: Any, layout: str) -> tuple[dict[str, Any], int]:
    """All tokens go to rank 1, whose window they do not fit in; fewer do."""
    setup = Setup(group, hidden=1024, max_tokens=1024, window_bytes=WINDOW_BYTES)
    idx = torch.tensor([[3, -1]]).repeat(1024, 1) if group.size() == 3 else setup.idx
    told = fault(lambda: setup.buf.dispatch(setup.x, idx, layout=layout))
    setup.x, setup.idx, setup.tokens = setup.x[:8], idx[:8], 8
    if layout != "padded":  # whose size does not depend on the number of tokens
        recv = setup.buf.dispatch(setup.x, setup.idx, layout=layout)
        y = setup.buf.combine(recv.x, recv.plan)
        assert torch.equal(y, setup.x)
    owned = setup.buf.local_experts
    setup.buf.destroy()
    return told, owned


@pytest.mark.parametrize("layout", ["token", "expert", "padded"])
def test_window_full(layout: str) -> None:
    answers = launcher.pool().run(3, run_window_full, layout)
    assert [owned for _, owned in answers] == [3, 3, 2]
    for told, _ in answers:
        assert told["type"] == "WindowFull", told
        assert told["text"] == answers[0][0]["text"]
        assert told["rank"] == (0 if layout == "padded" else 1)
        assert told["needed_bytes"] > told["free_bytes"]
        assert 0 < told["free_bytes"] <= WINDOW_BYTES
        assert str(told["needed_bytes"]) in told["text"]
        assert str(told["free_bytes"]) in told["text"]


def run_window_fills_up(group: Any) -> int:
    """Held tensors fill the window; letting go of them makes room, in any order."""
    setup = Setup(group, hidden=1024, max_tokens=64, window_bytes=WINDOW_BYTES)
    counts = []
    for order in (1, -1):
        held: list[tuple[torch.Tensor, torch.Tensor]] = []
        told = {"type": "nothing"}
        while told["type"] == "nothing":
            setup.x.fill_(len(held) + 1)
            setup.recv = None
            told = fault(setup.dispatch)
            if told["type"] == "nothing":
                held.append((setup.recv.x, setup.recv.x.clone()))
        assert told["type"] == "WindowFull", told
        assert all(torch.equal(x, copy) for x, copy in held)
        counts.append(len(held))
        held = held[::order][len(held) // 2 :]
        setup.check()
        assert all(torch.equal(x, copy) for x, copy in held)
        setup.recv = None
    setup.buf.destroy()
    return min(counts)


def test_window_fills_up_and_empties() -> None:
    assert min(launcher.pool().run(2, run_window_fills_up)) >= 3


def run_no_room_to_combine(group: Any) -> dict[str, Any]:
    setup = Setup(group, hidden=1024, max_tokens=64, window_bytes=WINDOW_BYTES)
    held = [setup.dispatch() for _ in range(7)]
    told = fault(setup.combine)
    del held[0]
    owners = setup.idx // -(-8 // group.size())
    copies = 1 + (owners[:, 0] != owners[:, 1]).float()
    assert torch.equal(setup.combine().float(), setup.x.float() * copies[:, None])
    setup.buf.destroy()
    return told


def test_no_room_to_combine() -> None:
    told = launcher.pool().run(2, run_no_room_to_combine)
    for one in told:
        assert one["type"] == "WindowFull" and one["text"] == told[0]["text"], one


def run_nothing_received_into_a_full_window(group: Any) -> None:
    """A rank that receives nothing needs no room."""
    setup = Setup(group, hidden=1024, max_tokens=64, window_bytes=WINDOW_BYTES)
    setup.idx = torch.zeros_like(setup.idx)  # all to rank 0
    hog = []
    if group.rank() == 1:
        while (piece := setup.buf._native.allocate(512)) is not None:
            hog.append(piece)
        assert hog
    recv = setup.dispatch()
    again = setup.buf.dispatch(setup.x, plan=recv.plan)
    assert torch.equal(again.x, recv.x)
    assert len(recv.x) == (0 if group.rank() else 64 * group.size())
    setup.buf.destroy()


def test_nothing_received_into_a_full_window() -> None:
    launcher.pool().run(2, run_nothing_received_into_a_full_window)


# Nothing is left behind.


def _open_things() -> tuple[int, int, int]:
    """File descriptors, threads and mapped windows of this process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    fds, tasks = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    return fds, tasks, maps.count("epcomm-window")


def run_cycles(group: Any, cycles: int) -> tuple[Any, Any]:
    before = None
    for cycle in range(cycles + 3):
        setup = Setup(group)
        setup.check()
        if cycle % 3 == 0:
            setup.buf.destroy()
        del setup  # without destroy() the last reference does it
        if cycle == 2:
            before = _open_things()
    return before, _open_things()


def test_many_buffers_leave_nothing() -> None:
    for before, after in launcher.pool().run(3, run_cycles, 50):
        assert after == before
        assert after[2] == 0


def run_tensors_outlive_the_buffer(group: Any) -> int:
    setup = Setup(group)
    recv = setup.dispatch()
    copy = recv.x.clone()
    setup.buf.destroy()
    del setup
    gc.collect()
    assert torch.equal(recv.x, copy)
    recv.x.add_(1.0)
    del recv
    return _open_things()[2]


def test_tensors_outlive_the_buffer() -> None:
    assert launcher.pool().run(3, run_tensors_outlive_the_buffer) == [0, 0, 0]
