"""Small batches of the nccl transport through peers' windows: on all ranks alike, or on none.

How their rows move is tested where all transports are; tests/sim/nccl_window_test.cc has all that
keeps a group from it.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import launcher
from epcomm import env
from simulated import needs_simulator

DEVICES = pytest.mark.parametrize(
    "device",
    [
        pytest.param("simulated", marks=needs_simulator),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


class Texts(logging.Handler):
    """What epcomm logs."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(record.getMessage())


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """A variable of this rank's environment."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def make(group: Any, max_tokens: int = 16, **options: str) -> Any:
    import epcomm

    return epcomm.Buffer(
        group,
        num_experts=8,
        hidden=64,
        topk=2,
        max_tokens=max_tokens,
        transport="nccl",
        transport_options=options,
        timeout=launcher.TIMEOUT_S,
    )


def round_trips(buf: Any, device: str) -> None:
    target = "cuda" if device == "cuda" else "cpu"
    rng = torch.Generator().manual_seed(buf.rank)
    for call in range(4):
        x = torch.randint(-8, 9, (12, 64), generator=rng).bfloat16().to(target)
        idx = torch.rand(12, 8, generator=rng).topk(2).indices.to(target)
        weights = (2.0 ** torch.randint(-2, 2, (12, 2), generator=rng)).to(target)
        recv = buf.dispatch(x, idx, weights, host_sync=call % 2 == 0)
        y = buf.combine(recv.x, recv.plan, topk_weights=weights)
        assert torch.equal(y.float(), x.float() * weights.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("name", "value", "refuses"),
    [
        *(("NCCL_P2P_DISABLE", value, value == "1") for value in ("", "0", "1")),
        *(("NCCL_P2P_LEVEL", value, False) for value in ("", "SYS", "4", "9")),
        *(("NCCL_P2P_LEVEL", value, True) for value in ("LOC", "NVL", "PIX", "PHB", "0", "3")),
    ],
)
def test_what_refuses(
    name: str, value: str, refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in ("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"):
        monkeypatch.delenv(known, raising=False)
    assert env.nccl_refusal() == ""
    monkeypatch.setenv(name, value)
    refusal = env.nccl_refusal()
    assert (name in refusal and value in refusal) if refuses else refusal == ""


def run_one_differs(group: Any, parent: Any, device: str) -> list[str]:
    """One rank forbids by its environment; what the others do and say."""
    texts = Texts()
    logger = logging.getLogger("epcomm")
    logger.addHandler(texts)
    logger.setLevel(logging.INFO)
    odd = group.rank() == 1
    # No communicator is made: NCCL asks each rank for itself, and ranks that differ are none of its
    # cases.
    with (
        variable("NCCL_P2P_DISABLE", "1" if odd else "0"),
        pytest.raises(ValueError, match=r"'window', but NCCL_P2P_DISABLE is 1 on rank 1$"),
    ):
        make(group, algorithm="window")
    with variable("NCCL_HOSTID", "there" if odd else "here"):
        with pytest.raises(ValueError, match=r"'window', but ranks 0 and 1 are on different hosts"):
            make(group, algorithm="window")
        with make(group) as buf:
            assert buf.transport == "nccl" and not buf.caps.small_batches
            round_trips(buf, device)
    return texts.all


@DEVICES
def test_ranks_whose_environments_differ_agree(device: str) -> None:
    size = 3 if device == "simulated" else launcher.gpu_ranks(3)
    if size < 2:
        pytest.skip("needs 2 ranks")
    env = launcher.OVER_LOOPBACK
    with launcher.spawn(size, run_one_differs, device, device=device, env=env) as ranks:
        for texts in ranks.results(timeout=120.0):
            reason = "transport nccl: rows go through NCCL, not window, because ranks 0 and 1"
            assert len([text for text in texts if text.startswith(reason)]) == 1, texts


def run_one_gpu(group: Any, parent: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(0)
    with (
        variable("NCCL_HOSTID", "here"),
        pytest.raises(ValueError, match=r"ranks 0 and 1 use the same GPU; call torch.cuda"),
    ):
        make(group, algorithm="static")
    with variable("NCCL_HOSTID", f"host{group.rank()}"), make(group, algorithm="static") as buf:
        round_trips(buf, device)


@DEVICES
def test_ranks_of_one_gpu_need_host_ids(device: str) -> None:
    env = launcher.OVER_LOOPBACK | {"EPCOMM_SIM_GPU": "7"}
    with launcher.spawn(2, run_one_gpu, device, device=device, env=env) as ranks:
        ranks.results(timeout=120.0)


def run_by_itself(group: Any, parent: Any, device: str, taken: bool) -> list[str]:
    texts = Texts()
    logger = logging.getLogger("epcomm")
    logger.addHandler(texts)
    logger.setLevel(logging.INFO)
    with make(group) as buf:
        assert buf.transport == "nccl" and buf.caps.small_batches == taken
        assert buf.caps.two_phases == taken and buf.caps.wait_times == taken
        round_trips(buf, device)
    with make(group, algorithm="small") as buf:  # stays what it is
        assert not buf.caps.small_batches
        round_trips(buf, device)
    with make(group, max_tokens=300) as buf:
        assert not buf.caps.small_batches
        round_trips(buf, device)
    return texts.all


@DEVICES
@pytest.mark.parametrize("disabled", ["0", "1"])
def test_what_is_taken_is_logged(device: str, disabled: str) -> None:
    size = 2 if device == "simulated" else launcher.gpu_ranks(4)
    reason = {
        "0": "transport nccl: algorithm window, because every GPU of the group can address",
        "1": "transport nccl: rows go through NCCL, not window, because NCCL_P2P_DISABLE is 1 on",
    }[disabled]
    env = {"NCCL_P2P_DISABLE": disabled}
    args = (device, disabled == "0")
    with launcher.spawn(size, run_by_itself, *args, device=device, env=env) as ranks:
        for texts in ranks.results(timeout=120.0):
            assert len([text for text in texts if text.startswith(reason)]) == 1, texts
            large = [text for text in texts if "max_tokens is 300" in text]
            assert len(large) == 1 and "not window" in large[0], texts
