"""How ranks agree on a transport; ranks are threads, and the GPU is a stand-in."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from epcomm import agreement, native
from epcomm.agreement import Choice


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

    def __init__(
        self,
        bad: str = "",
        names: tuple[str, ...] = ("nccl", "nvlink"),
        apart: bool = False,
    ) -> None:
        self.names = list(names)
        self.bad = bad
        self.apart = apart  # from the other GPUs of its machine
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

    def check_peer_access_in_nodes(self, bootstrap: Any, timeout: float, nodes: int) -> Any:
        assert timeout == 5.0
        bootstrap.all_gather(bytes([nodes]))  # collective
        self.nodes = nodes
        return SimpleNamespace(good=not self.apart)

    def why_not_small_batches(self, num_ranks: int, num_experts: int, max_tokens: int) -> str:
        return "" if max_tokens <= 256 and num_ranks * num_experts <= 1024 else "too large"


def choices(
    monkeypatch: pytest.MonkeyPatch,
    wanted: list[str],
    gpus: list[Gpu | None],
    max_tokens: Any = None,
    machines: tuple[bytes, ...] | None = None,
    num_experts: int = 256,
) -> list[Choice]:
    """What each rank takes, given what it asks for and has. machines: where it is."""
    here = threading.local()
    monkeypatch.setattr(
        agreement, "_machine", lambda: machines[here.rank] if machines else bytes(8)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here.gpu is not None)
    for module in (agreement, native):
        monkeypatch.setattr(module, "load_cuda", lambda: here.gpu)
    group = Group(len(wanted))

    def run(rank: int) -> Choice:
        here.gpu, here.rank = gpus[rank], rank
        most = max_tokens[rank] if isinstance(max_tokens, list) else max_tokens
        sizes = num_experts, most
        return agreement.agree_on_transport(group.of(rank), wanted[rank], 5.0, sizes)

    with ThreadPoolExecutor(len(wanted)) as threads:
        return list(threads.map(run, range(len(wanted))))


def agree(*args: Any) -> list[str]:
    """The transports alone."""
    return [choice.transport for choice in choices(*args)]


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


class TestSeveralMachines:
    """rdma for small batches, hierarchical for larger ones."""

    TWO = (b"machine0", b"machine0", b"machine1", b"machine1")

    @pytest.fixture(autouse=True)
    def built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native.nvshmem, "built_transports", lambda: ["hierarchical", "rdma"])
        monkeypatch.setattr(native.nvshmem, "load", lambda: None)

    def gpus(self, apart: int | None = None) -> list[Gpu | None]:
        return [Gpu("no peer access", apart=r == apart) for r in range(4)]

    def test_by_size(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for tokens, taken in (
            (1, Choice("rdma")),
            (256, Choice("rdma")),
            (257, Choice("hierarchical", 2)),
            (np.int64(128), Choice("rdma")),
            (None, Choice("hierarchical", 2)),
            # All take the same, and the Buffer that they make refuses sizes that differ.
            ([256, 256, 257, 256], Choice("hierarchical", 2)),
        ):
            with caplog.at_level(logging.INFO, "epcomm"):
                found = choices(monkeypatch, ["auto"] * 4, self.gpus(), tokens, self.TWO)
            assert found == [taken] * 4
            assert f"transport auto: {taken.transport}, because the ranks are on" in caplog.text
            caplog.clear()

    def test_experts_count_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = choices(monkeypatch, ["auto"] * 4, self.gpus(), 64, self.TWO, 512)
        assert found == [Choice("hierarchical", 2)] * 4

    def test_without_nvlink_in_the_build(self, monkeypatch: pytest.MonkeyPatch) -> None:
        without = [Gpu(names=("nccl",)) for _ in range(4)]
        assert agree(monkeypatch, ["auto"] * 4, [*without], 8, self.TWO) == ["rdma"] * 4
        # Nobody, or not everybody, can say whether the GPUs of a machine address each other.
        assert agree(monkeypatch, ["auto"] * 4, [*without], 257, self.TWO) == ["nccl"] * 4
        some = [*self.gpus()[:3], *without[:1]]
        assert agree(monkeypatch, ["auto"] * 4, some, 257, self.TWO) == ["nccl"] * 4

    def test_nvlink_across_machines_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpus = [Gpu() for _ in range(4)]
        assert agree(monkeypatch, ["auto"] * 4, [*gpus], 256, self.TWO) == ["nvlink"] * 4

    def test_not_on_one_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for tokens in (256, 257):
            one = agree(monkeypatch, ["auto"] * 4, self.gpus(), tokens, (b"machine0",) * 4)
            assert one == ["nccl"] * 4

    @pytest.mark.parametrize(
        ("machines", "ranks_per_node"),
        [("aabb", 2), ("aaab", 3), ("abcd", 1), ("abbb", None), ("abab", None)],
    )
    def test_machines_are_nodes(
        self, monkeypatch: pytest.MonkeyPatch, machines: str, ranks_per_node: int | None
    ) -> None:
        places = tuple(one.encode() * 8 for one in machines)
        gpus = [Gpu("no peer access") for _ in range(4)]
        found = choices(monkeypatch, ["auto"] * 4, [*gpus], 4096, places)
        auto = "nccl" if ranks_per_node is None else "hierarchical"
        assert found == [Choice(auto, ranks_per_node)] * 4
        # Who names it gets it, and the same nodes.
        found = choices(monkeypatch, ["hierarchical"] * 4, [*gpus], 4096, places)
        assert found == [Choice("hierarchical", ranks_per_node)] * 4

    def test_machines_without_peer_access_inside(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, "epcomm"):
            apart = agree(monkeypatch, ["auto"] * 4, self.gpus(apart=2), 4096, self.TWO)
        assert apart == ["nccl"] * 4
        text = "not hierarchical, because the GPUs of the machines of ranks [2] cannot"
        assert caplog.text.count(text) == 4
        small = agree(monkeypatch, ["auto"] * 4, self.gpus(apart=2), 256, self.TWO)
        assert small == ["rdma"] * 4

    @pytest.mark.parametrize("tokens", [256, 257])
    @pytest.mark.parametrize("error", [ValueError, ImportError, AttributeError])
    def test_on_all_ranks_or_on_none(
        self,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        error: type[Exception],
        tokens: int,
    ) -> None:
        def load() -> None:
            if threading.current_thread().name.endswith("_1"):
                raise error("no library here")

        monkeypatch.setattr(native.nvshmem, "load", load)
        with caplog.at_level(logging.INFO, "epcomm"):
            assert agree(monkeypatch, ["auto"] * 4, self.gpus(), tokens, self.TWO) == ["nccl"] * 4
        texts = [record.message for record in caplog.records]
        assert sum("because no library here" in text for text in texts) == 1
        assert sum("because ranks [1] cannot" in text for text in texts) == 3

    def test_too_many_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agreement, "_MOST_LINK_RANKS", 3)
        assert agree(monkeypatch, ["auto"] * 4, self.gpus(), 999, self.TWO) == ["nccl"] * 4


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
    position = agreement._Position("nccl", "cpu", True, b"12345678")
    assert len(position.packed()) == 128
    assert agreement._Position.unpacked(position.packed()) == position
