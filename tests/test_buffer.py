"""What a Buffer is beyond one call: properties, groups, mixed formats, events, lifetimes."""

import gc
import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import checks
import launcher
from cases import Case, Format
from checks import Layout
from test_misuse import EXPERTS, HIDDEN, MAX_TOKENS, TOPK, Setup, _fp8
from trial import Trial


def run_properties(group: Any) -> list[Any]:
    import epcomm

    with Setup(group).buf as buf:
        caps = buf.caps
        names = ("token_layout", "expert_layout", "padded_layout", "symmetric_outputs")
        flags = [getattr(caps, name) for name in (*names, "graph_capture", "cuda")]
        assert all(isinstance(flag, bool) for flag in flags)
        told = [buf.rank, buf.num_ranks, buf.local_experts, buf.transport, caps.cuda]
    with pytest.raises(epcomm.BufferUnusable):
        buf.dispatch(torch.zeros(1, HIDDEN, dtype=torch.bfloat16), torch.zeros(1, 1).long())
    return told


def test_properties() -> None:
    told = launcher.pool().run(4, run_properties)
    assert told == [[r, 4, n, "cpu", False] for r, n in enumerate([2, 2, 2, 0])]


def run_default_group(group: Any) -> int:
    import epcomm

    with epcomm.Buffer(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=4) as buf:
        if not torch.cuda.is_available():
            assert buf.transport == "cpu"
        return int(buf.num_ranks)


def test_the_default_group_and_transport() -> None:
    pool = launcher.pool()
    assert pool.run(pool.size, run_default_group) == [pool.size] * pool.size


class ObjectsOverTheGroup:
    """A user's own Bootstrap, by other means than epcomm's."""

    def __init__(self, group: Any):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def all_gather(self, data: bytes) -> list[bytes]:
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, data, group=self.group)
        return out

    def barrier(self) -> None:
        self.all_gather(b"")


class ForgetsARank(ObjectsOverTheGroup):
    def all_gather(self, data: bytes) -> list[bytes]:
        return super().all_gather(data)[:-1]


class CutsBytes(ObjectsOverTheGroup):
    def all_gather(self, data: bytes) -> list[bytes]:
        return [item[:-1] for item in super().all_gather(data)]


def run_own_bootstrap(group: Any) -> list[str]:
    import epcomm

    bootstrap = ObjectsOverTheGroup(group)
    assert isinstance(bootstrap, epcomm.Bootstrap)
    setup = Setup(bootstrap)
    assert setup.combine().shape == setup.x.shape
    setup.buf.destroy()
    texts = []
    for broken in (ForgetsARank, CutsBytes):
        with pytest.raises(epcomm.Error) as error:
            Setup(broken(group))
        texts.append(str(error.value))
    return texts


def test_own_bootstrap() -> None:
    for few, short in launcher.pool().run(3, run_own_bootstrap):
        assert "all_gather" in few and "2" in few and "3" in few
        assert "all_gather" in short and "bytes" in short


SCALES = [
    (torch.float32, 1),
    (torch.float32, 3),
    (torch.int32, 5),
    (torch.uint8, 7),
    (torch.float8_e4m3fn, 9),
]


def run_mixed_formats(group: Any) -> int:
    """One Buffer of the widest dtype takes all formats, call by call, with scales of any shape."""
    import epcomm

    case = Case("mixed", tokens=(5, 0, 9), units=16)
    hidden = 64
    formats = [Format(str(d), d, d, 4) for d in (torch.float32, torch.bfloat16, torch.float16)]
    calls = 0
    with epcomm.Buffer(
        group, num_experts=9, hidden=hidden, topk=4, max_tokens=24, dtype=torch.float32
    ) as buf:
        trials = []
        for layout in (Layout("token"), Layout("expert", 4), Layout("padded")):
            for fmt in formats:
                trials.append(MixedTrial(buf, case, layout, fmt))
                trials[-1].combine(trials[-1].dispatch(0), 1, weighted=True, bias=True)
                calls += 1
            for q_dtype in (torch.float8_e4m3fn, torch.uint8):
                for dtype, count in SCALES:
                    trial = MixedTrial(buf, case, layout, Format("q", q_dtype, torch.bfloat16, 4))
                    trial.scales = (dtype, count)
                    trial.dispatch(2)
                    trials.append(trial)
                    calls += 1
        for trial in trials:
            trial.check_held()
    return calls


class MixedTrial(Trial):
    """Rows of 64 elements whatever the dtype, and scales of any shape."""

    scales: tuple[torch.dtype, int] | None = None

    def rows_of(self, rank: int, salt: int) -> Any:
        rng, n = self.case.rng(self.num_ranks, rank, salt), self.case.num_tokens(rank)

        def bits(width: int, dtype: torch.dtype) -> torch.Tensor:
            x = torch.empty(n, width, dtype=dtype)
            raw = rng.integers(0, 256, (n, width * dtype.itemsize), dtype=np.uint8)
            x.view(torch.uint8).copy_(torch.from_numpy(raw))
            return x

        x = bits(64, self.fmt.row_dtype)
        return x if self.scales is None else (x, bits(self.scales[1], self.scales[0]))


def test_mixed_formats_in_one_buffer() -> None:
    assert set(launcher.pool().run(3, run_mixed_formats)) == {3 * (3 + 2 * len(SCALES))}


def run_async(group: Any) -> None:
    import epcomm

    setup = Setup(group)
    plain, y = setup.dispatch(), setup.combine()
    recv = setup.dispatch(async_op=True, previous_event=plain.event, num_sms=4)
    for event in (plain.event, recv.event):
        assert isinstance(event, epcomm.Event)
        event.wait()
        event.synchronize()
        assert event.query() is True
    assert torch.equal(recv.x, plain.x) and plain.hook is None and recv.hook is None
    hooked = setup.dispatch(return_recv_hook=True)
    assert hooked.hook is not None
    hooked.hook()
    assert torch.equal(hooked.x, plain.x)
    for kind in ("async_op", "return_recv_hook"):
        combined = setup.combine(**{kind: True, "previous_event": recv.event, "num_sms": 2})
        assert isinstance(combined, epcomm.Combined)
        if kind == "return_recv_hook":
            combined.hook()
        combined.event.wait()
        assert torch.equal(combined.y, y)
    with pytest.raises(AttributeError):
        recv.x = None
    setup.buf.destroy()


def test_asynchronous_arguments_work_without_a_gpu() -> None:
    launcher.pool().run(2, run_async)


def run_profiled(group: Any) -> set[str]:
    setup = Setup(group)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        recv = setup.dispatch(quant=None)
        setup.combine()
        setup.buf.combine_topk_weights(recv.topk_weights, recv.plan)
        setup.dispatch(x=(_fp8(), torch.ones(len(setup.x), 1)), topk_weights=None)
    setup.buf.destroy()
    return {event.key for event in profile.key_averages() if event.key.startswith("epcomm.")}


def test_profiled_ranges_tell_bytes() -> None:
    """5 tokens of 64 channels: bf16, 4 floats of slots, e4m3 and one scale."""
    for names in launcher.pool().run(2, run_profiled):
        assert names == {
            "epcomm.dispatch 640 bytes",
            "epcomm.combine 640 bytes",
            "epcomm.combine_topk_weights 80 bytes",
            "epcomm.dispatch 340 bytes",
        }


def run_views(group: Any) -> None:
    """A view or a numpy array keeps what it shows, whatever becomes of the tensor."""
    setup = Setup(group)
    held = []
    for call in range(40):
        recv = setup.dispatch(x=setup.x * call)
        array = recv.x[0].view(torch.int16).numpy()
        held.append((recv.x[-1:], recv.x[-1:].clone(), array, array.copy()))
        del recv, array
        if call % 8 == 0:
            gc.collect()
    for view, copy, array, array_copy in held:
        checks.same_bits(view, copy, "view")
        assert np.array_equal(array, array_copy)
    setup.buf.destroy()


def test_views_keep_their_memory() -> None:
    launcher.pool().run(2, run_views)


def run_bits(group: Any) -> None:
    """NaN payloads, infinities and denormals arrive as they were sent; combine of one row too."""
    setup = Setup(group)
    bits = torch.arange(MAX_TOKENS * HIDDEN, dtype=torch.int32) * 127 + group.rank()
    x = bits.to(torch.int16).view(torch.bfloat16).view(MAX_TOKENS, HIDDEN)
    idx = torch.full((MAX_TOKENS, 1), 0)
    recv = setup.buf.dispatch(x, idx)
    if group.rank() == 0:
        for rank in range(group.size()):
            theirs = (bits - group.rank() + rank).to(torch.int16).view(torch.bfloat16)
            mine = recv.x[rank * MAX_TOKENS : (rank + 1) * MAX_TOKENS]
            checks.same_bits(mine, theirs.view(MAX_TOKENS, HIDDEN), f"rows of rank {rank}")
    y = setup.buf.combine(recv.x, recv.plan)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()])
    setup.buf.destroy()


def test_special_values() -> None:
    launcher.pool().run(2, run_bits)


def run_environment(group: Any) -> list[str]:
    texts = []
    for name, value in (
        ("EPCOMM_TRANSPORT", "pigeon"),
        ("EPCOMM_TIMEOUT", "soon"),
        ("EPCOMM_WINDOW_BYTES", "much"),
        ("EPCOMM_RANKS_PER_NODE", "two"),
        ("EPCOMM_STATISTICS", "yes"),
    ):
        os.environ[name] = value
        try:
            changes: dict[str, Any] = {"transport": "auto", "timeout": None, "window_bytes": None}
            with pytest.raises(ValueError) as error:
                Setup(group, **changes)
            texts.append(f"{name} {value}: {error.value}")
            given: dict[str, Any] = {"ranks_per_node": 1, "statistics": True}
            Setup(group, window_bytes=1 << 22, **given).buf.destroy()
        finally:
            del os.environ[name]
    return texts


def test_environment_sets_defaults_only() -> None:
    """A wrong value is refused; an argument that is given wins over it."""
    for transport, timeout, window, nodes, counts in launcher.pool().run(2, run_environment):
        assert "pigeon" in transport.partition(": ")[2]
        assert "EPCOMM_TIMEOUT" in timeout.partition(": ")[2] and "soon" in timeout
        assert "EPCOMM_WINDOW_BYTES" in window.partition(": ")[2] and "much" in window
        assert "EPCOMM_STATISTICS" in counts.partition(": ")[2] and "yes" in counts
        assert "EPCOMM_RANKS_PER_NODE" in nodes.partition(": ")[2] and "two" in nodes


def run_combine_input(group: Any) -> None:
    import epcomm

    with epcomm.Buffer(
        group, num_experts=4, hidden=8, topk=1, max_tokens=4, window_bytes=1 << 20, timeout=20.0
    ) as buf:
        x = torch.full((4, 8), float(1 + buf.rank), dtype=torch.bfloat16)
        for layout in ("token", "expert", "padded"):
            recv = buf.dispatch(x, torch.arange(4)[:, None], layout=layout)
            out = buf.combine_input(recv.plan)
            assert out.shape == recv.x.shape and out.dtype == torch.bfloat16
            out.copy_(recv.x)
            assert torch.equal(buf.combine(out, recv.plan), x)
        assert buf.combine_input(recv.plan, torch.float16).dtype == torch.float16
        with pytest.raises(ValueError, match=r"dtype is torch\.float32"):
            buf.combine_input(recv.plan, torch.float32)
        kept = []
        with pytest.raises(epcomm.WindowFull) as full:
            for _ in range(100_000):
                kept.append(buf.combine_input(recv.plan))
        assert full.value.rank == buf.rank
        assert full.value.needed_bytes > full.value.free_bytes


def test_combine_input() -> None:
    launcher.pool().run(2, run_combine_input)
