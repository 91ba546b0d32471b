"""deep_ep's interface with tensors on GPUs, on the transport that "auto" takes."""

import ctypes
from collections.abc import Callable
from typing import Any

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
@pytest.mark.parametrize(
    "kind", [{}, {"round_scale": True}, {"round_scale": True, "use_ue8m0": True}]
)
def test_low_latency_fp8(kind: dict[str, bool], how: dict[str, bool]) -> None:
    run(low_latency.run_fp8, kind, how)


def test_low_latency_handle_and_both_modes() -> None:
    run(low_latency.run_handle)
    run(low_latency.run_both_modes)


@pytest.mark.parametrize("synced", [True, False])
def test_elastic(synced: bool) -> None:
    run(elastic.run_tokens, synced, 8)
    run(elastic.run_expanded, synced, 16)
    run(elastic.run_fp8, True, False)
    run(elastic.run_fp8, synced, True)


# Ranks, experts, tokens, top-k.
LAYOUTS = [(4, 256, 4096, 8), (4, 256, 5001, 9), (16, 64, 300, 6), (1, 8, 40, 2), (3, 12, 0, 4)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("ranks", "experts", "tokens", "topk"), LAYOUTS)
def test_dispatch_layout(
    ranks: int, experts: int, tokens: int, topk: int, dtype: torch.dtype
) -> None:
    """The kernel gives what torch gives on the CPU, which other tests compare with an oracle."""
    from epcomm.compat.deep_ep.layout import dispatch_layout

    generator = torch.Generator().manual_seed(tokens)
    idx = torch.randint(-2, experts + 1, (tokens, topk), generator=generator, dtype=dtype)
    sent = idx.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Memory of the results is not zero before.
        torch.full((tokens * ranks + 4096,), -1, dtype=torch.int32, device="cuda")
        made = dispatch_layout(sent, experts, ranks)
    stream.synchronize()
    for got, wanted in zip(made, dispatch_layout(idx, experts, ranks), strict=True):
        if wanted is None:
            assert got is None
            continue
        assert got.is_cuda and got.dtype == wanted.dtype and got.shape == wanted.shape
        # As bytes: a bool that is neither 0 nor 1 would compare as True.
        assert torch.equal(got.cpu().view(torch.uint8), wanted.view(torch.uint8))


def nodes(call: Callable[[], Any]) -> int:
    """Kernels, copies and fills of a call, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        result = call()
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    del result
    return count.value


def run_nodes(group: Any, device: str) -> dict[str, int]:
    from epcomm.compat.deep_ep import Buffer

    most, experts, hidden = 64, 8 * group.size(), 512
    x = torch.randn(most, hidden, device=device).bfloat16()
    idx = torch.arange(4 * most, device=device).view(most, 4) % experts
    weights = torch.rand(most, 4, device=device)
    buffer = Buffer(group, low_latency_mode=True)

    def dispatch(**how: Any) -> Any:
        return buffer.low_latency_dispatch(x, idx, most, experts, **how)

    received = dispatch(use_fp8=False)
    out, handle = received[0], received[2]
    dispatch()

    def halves() -> None:
        *_, hook = dispatch(return_recv_hook=True)
        hook()

    return {
        "get_dispatch_layout": nodes(lambda: buffer.get_dispatch_layout(idx, experts)),
        "fp8": nodes(dispatch),
        "ue8m0": nodes(lambda: dispatch(round_scale=True, use_ue8m0=True)),
        "bf16": nodes(lambda: dispatch(use_fp8=False)),
        "combine": nodes(lambda: buffer.low_latency_combine(out, idx, weights, handle)),
        "halves": nodes(halves),
    }


def test_a_low_latency_call_is_one_kernel() -> None:
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        pytest.skip("this torch does not show its graphs")
    pool = launcher.pool("cuda")
    (counts, *others) = pool.run(min(pool.size, 4), run_nodes, "cuda")
    assert all(other == counts for other in others)
    two = ("halves",)
    assert counts == {name: 2 if name in two else 1 for name in counts}
