"""deep_ep's interface with tensors on GPUs, on the transport that "auto" takes."""

import pytest
import torch

import launcher
import test_compat_elastic as elastic
import test_compat_low_latency as low_latency
import test_compat_normal as normal

pytestmark = pytest.mark.gpu

HOWS = [{}, {"async_finish": True}, {"return_recv_hook": True}]


def run(fn, *args) -> None:
    pool = launcher.pool("cuda")
    pool.run(min(pool.size, 4), fn, *args, "cuda")


@pytest.mark.parametrize("async_finish", [False, True])
@pytest.mark.parametrize("tokens", [[5, 0, 9], [300], [0]])
def test_normal_round(tokens: list[int], async_finish: bool) -> None:
    run(normal.run_round, tokens, 8, async_finish)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32])
def test_normal_fp8_pairs(scale_dtype: torch.dtype) -> None:
    run(normal.run_fp8, scale_dtype)


@pytest.mark.parametrize("worst", [24, 50])
def test_num_worst_tokens(worst: int) -> None:
    run(normal.run_worst, worst)


def test_growth() -> None:
    ranks = min(launcher.pool("cuda").size, 4)
    sizes = [[3] * ranks, [300, *[1] * (ranks - 1)], [600] * ranks, [0, *[1025] * (ranks - 1)]]
    run(normal.run_growth, sizes)


@pytest.mark.parametrize("how", HOWS)
def test_low_latency(how: dict[str, bool]) -> None:
    run(low_latency.run_bf16, [7, 0, 3], how)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", [{}, {"round_scale": True, "use_ue8m0": True}])
def test_low_latency_fp8(kind: dict[str, bool], how: dict[str, bool]) -> None:
    run(low_latency.run_fp8, kind, how)


def test_low_latency_handle_and_both_modes() -> None:
    run(low_latency.run_handle)
    run(low_latency.run_both_modes)


@pytest.mark.parametrize("synced", [True, False])
def test_elastic(synced: bool) -> None:
    run(elastic.run_tokens, synced, 8)
    run(elastic.run_expanded, synced, 16)
    run(elastic.run_fp8, True)
