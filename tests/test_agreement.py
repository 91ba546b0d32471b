"""How ranks agree on a transport; ranks are threads, and the GPU is a stand-in."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epcomm import native


class Group:
    """An in-process bootstrap: one object per rank over shared slots."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[bytes] = [b""] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def of(self, rank: int) -> Any:
        def all_gather(data: bytes) -> list[bytes]:
            self.slots[rank] = data
            self.barrier.wait()
            gathered = list(self.slots)
            self.barrier.wait()
            return gathered

        return SimpleNamespace(rank=rank, size=self.size, all_gather=all_gather)


class Gpu:
    """Stands for _cuda with the nvlink transport."""

    archs = "90a"

    def __init__(self, bad: str = "", names: tuple[str, ...] = ("nccl", "nvlink")) -> None:
        self.names = list(names)
        self.bad = bad
        self.checks = 0

    def transports(self) -> list[str]:
        return self.names

    def device_status(self) -> dict[str, object]:
        return {"count": 1, "reason": "", "capability": "9.0"}

    def check_peer_access(self, bootstrap: Any, timeout: float) -> Any:
        assert timeout == 5.0
        bootstrap.all_gather(b"x")  # collective
        self.checks += 1
        return SimpleNamespace(good=not self.bad, text=self.bad)


def agree(
    monkeypatch: pytest.MonkeyPatch,
    wanted: list[str],
    gpus: list[Gpu | None],
    max_tokens: int | None = None,
    machines: tuple[bytes, ...] | None = None,
) -> list[str]:
    """What each rank takes, given what it asks for and has. machines: where it is."""
    here = threading.local()
    monkeypatch.setattr(native, "_machine", lambda: machines[here.rank] if machines else bytes(8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here.gpu is not None)
    monkeypatch.setattr(native, "load_cuda", lambda: here.gpu)
    group = Group(len(wanted))

    def run(rank: int) -> str:
        here.gpu, here.rank = gpus[rank], rank
        return native.agree_on_transport(group.of(rank), wanted[rank], 5.0, max_tokens)

    with ThreadPoolExecutor(len(wanted)) as threads:
        return list(threads.map(run, range(len(wanted))))


def test_auto_takes_nvlink_where_all_pairs_have_access(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu() for _ in range(3)]
    assert agree(monkeypatch, ["auto"] * 3, [*gpus]) == ["nvlink"] * 3
    assert [gpu.checks for gpu in gpus] == [1, 1, 1]


def test_auto_takes_nccl_on_all_ranks_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = "rank 0 -> rank 2: no peer access; rank 2 -> rank 0: no peer access"
    with caplog.at_level(logging.INFO, "epcomm"):
        assert agree(monkeypatch, ["auto"] * 3, [Gpu(bad) for _ in range(3)]) == ["nccl"] * 3
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and bad in warnings[0] and "nccl on all ranks" in warnings[0]
    chosen = [r.message for r in caplog.records if r.levelno == logging.INFO]
    assert len(chosen) == 3 and all(bad in text for text in chosen)


def test_a_build_without_nvlink_on_one_rank(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = [Gpu(), Gpu(names=("nccl",)), Gpu()]
    with caplog.at_level(logging.INFO, "epcomm"):
        assert agree(monkeypatch, ["auto"] * 3, [*gpus]) == ["nccl"] * 3
    assert [gpu.checks for gpu in gpus] == [0, 0, 0]
    assert "ranks [1]" in caplog.text


def test_builds_without_nvlink_do_not_mention_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = [Gpu(names=("nccl",)) for _ in range(2)]
    with caplog.at_level(logging.INFO, "epcomm"):
        assert agree(monkeypatch, ["auto"] * 2, [*gpus]) == ["nccl"] * 2
    assert "nvlink" not in caplog.text


def test_a_gpu_that_the_build_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Gpu()
    other.archs = "80-real"
    assert agree(monkeypatch, ["auto"] * 2, [Gpu(), other]) == ["nccl"] * 2


class TestRdma:
    """Several machines: rdma for small batches, once its flag is set."""

    TWO = (b"machine0", b"machine0", b"machine1", b"machine1")

    @pytest.fixture(autouse=True)
    def built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "AUTO_TAKES_RDMA", True)
        monkeypatch.setattr(native.nvshmem, "built_transports", lambda: ["rdma"])
        monkeypatch.setattr(native.nvshmem, "load", lambda: None)

    def test_small_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bad = [Gpu("no peer access") for _ in range(4)]
        assert agree(monkeypatch, ["auto"] * 4, [*bad], 256, self.TWO) == ["rdma"] * 4
        without = [Gpu(names=("nccl",)) for _ in range(4)]
        assert agree(monkeypatch, ["auto"] * 4, [*without], 8, self.TWO) == ["rdma"] * 4

    def test_nvlink_across_machines_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpus = [Gpu() for _ in range(4)]
        assert agree(monkeypatch, ["auto"] * 4, [*gpus], 256, self.TWO) == ["nvlink"] * 4

    def test_not_for_large_batches_nor_on_one_machine(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = [Gpu("no peer access") for _ in range(4)]
        assert agree(monkeypatch, ["auto"] * 4, [*bad], 257, self.TWO) == ["nccl"] * 4
        assert agree(monkeypatch, ["auto"] * 4, [*bad], None, self.TWO) == ["nccl"] * 4
        assert agree(monkeypatch, ["auto"] * 4, [*bad], 256, (b"machine0",) * 4) == ["nccl"] * 4

    def test_on_all_ranks_or_on_none(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def load() -> None:
            if threading.current_thread().name.endswith("_1"):
                raise ValueError("no library here")

        monkeypatch.setattr(native.nvshmem, "load", load)
        bad = [Gpu("no peer access") for _ in range(4)]
        with caplog.at_level(logging.INFO, "epcomm"):
            assert agree(monkeypatch, ["auto"] * 4, [*bad], 256, self.TWO) == ["nccl"] * 4
        assert "not rdma, because no library here" in caplog.text

    def test_left_to_who_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(native, "load_cuda", Gpu)
        assert not native._has_rdma(8)


def test_ranks_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Left for the Buffer to refuse: ConfigMismatch names both.
    assert agree(monkeypatch, ["auto"] * 2, [Gpu(), None]) == ["nccl", "cpu"]
    assert agree(monkeypatch, ["auto"] * 2, [None, None]) == ["cpu"] * 2


def test_a_rank_that_names_a_transport_decides_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu() for _ in range(3)]
    assert agree(monkeypatch, ["auto", "nccl", "auto"], [*gpus]) == ["nccl"] * 3
    assert agree(monkeypatch, ["cpu", "auto", "nccl"], [*gpus]) == ["cpu", "cpu", "nccl"]
    assert [gpu.checks for gpu in gpus] == [0, 0, 0]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPCOMM_TRANSPORT", "cpu")
    assert agree(monkeypatch, ["auto", "auto"], [Gpu(), Gpu()]) == ["cpu", "cpu"]
    assert agree(monkeypatch, ["nccl", "nccl"], [Gpu(), Gpu()]) == ["nccl", "nccl"]


def test_size_of_what_is_exchanged_never_changes() -> None:
    position = native._Position("nccl", "cpu", True, True, b"12345678")
    assert len(position.packed()) == 128
    assert native._Position.unpacked(position.packed()) == position
