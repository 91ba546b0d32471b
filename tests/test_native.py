"""Which extension module, GPU and transport a Buffer takes; without a GPU."""

import importlib.util
import logging

import pytest
import torch

from epcomm import Buffer, _core, native

ARGUMENTS = {"num_experts": 2, "hidden": 64, "topk": 1, "max_tokens": 4}
needs_cuda_module = pytest.mark.skipif(
    importlib.util.find_spec("epcomm._cuda") is None, reason=f"_cuda is {_core.cuda_status}"
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


class Alone:
    rank, size = 0, 1

    def all_gather(self, data: bytes) -> list[bytes]:
        return [data]

    def barrier(self) -> None:
        pass


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        ("80", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("80-real 90a 100a", [(8, 9), (9, 0), (10, 0)], [(7, 5), (10, 3), (12, 0)]),
    ],
)
def test_which_gpus_a_build_runs_on(
    archs: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(native._runs_on(archs.split(), *gpu) for gpu in runs)
    assert not any(native._runs_on(archs.split(), *gpu) for gpu in does_not)


class OtherGpu:
    """Stands for _cuda on a GPU that it was not built for."""

    archs = "90a 100a"

    def device_status(self) -> dict[str, object]:
        return {"count": 1, "reason": "", "capability": "12.0"}


def test_gpu_that_the_build_has_no_code_for() -> None:
    with pytest.raises(ValueError, match=r"90a 100a.*12\.0.*EPCOMM_CUDA_ARCHS=120"):
        native.check_device(OtherGpu())  # type: ignore[arg-type]


@needs_cuda_module
@no_gpu
def test_gpu_transport_without_a_gpu() -> None:
    cuda = native.load_cuda()
    assert cuda is not None and cuda.transports() == ["nccl", "nvlink"]
    with pytest.raises(ValueError, match="finds no GPU"):
        Buffer(Alone(), transport="nccl", **ARGUMENTS)


@no_gpu
def test_auto_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "epcomm"), Buffer(Alone(), **ARGUMENTS) as buf:
        assert buf.transport == "cpu"
    assert "transport auto: cpu, because torch sees no GPU" in caplog.text
