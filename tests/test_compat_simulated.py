"""deep_ep's interface on nvlink, on simulated GPUs: results, and what a call costs beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import launcher
import test_compat_low_latency as low_latency
import test_compat_normal as normal
from simulated import needs_simulator

pytestmark = needs_simulator


def on_nvlink(group: Any, fn: Callable[..., Any], *args: Any) -> Any:
    """fn with Buffers on nvlink; the interface takes `cpu` for CPU tensors, which these are."""
    import epcomm
    from epcomm.compat.deep_ep import pool

    def make(*args: Any, **kwargs: Any) -> epcomm.Buffer:
        return epcomm.Buffer(*args, **{**kwargs, "transport": "nvlink"})

    pool.Buffer = make
    try:
        return fn(group, *args)
    finally:
        pool.Buffer = epcomm.Buffer


def run(ranks: int, fn: Callable[..., Any], *args: Any) -> Any:
    return launcher.pool("simulated").run(ranks, on_nvlink, fn, *args, timeout=200.0)


HOWS = [{}, {"async_finish": True}, {"return_recv_hook": True}]


@pytest.mark.parametrize("how", HOWS)
def test_low_latency(how: dict[str, bool]) -> None:
    run(3, low_latency.run_bf16, [7, 0, 3], how)
    run(2, low_latency.run_fp8, {}, how)
    run(2, low_latency.run_fp8, {"round_scale": True, "use_ue8m0": True}, how)
    run(2, low_latency.run_fp8, {"round_scale": True}, how)


def test_handles() -> None:
    run(2, low_latency.run_handle)


def test_normal() -> None:
    run(3, normal.run_round, [5, 0, 9], 8, False)


# Operations of torch that make or look at tensors, but launch nothing on a GPU.
VIEWS = ("empty", "view", "slice", "select", "transpose", "expand", "as_strided", "alias", "detach")


class Launches(TorchDispatchMode):
    """The operations of torch that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not any(view in name for view in VIEWS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[str], Any]:
    with Launches() as seen:
        result = call(*args, **kwargs)
    return seen.names, result


def run_launches(group: Any) -> None:
    from epcomm.compat.deep_ep import Buffer

    most, experts, hidden = 16, 4 * group.size(), 512
    x = torch.randn(most, hidden).bfloat16()
    idx = torch.arange(2 * most).view(most, 2) % experts
    weights = torch.rand(most, 2)
    out = torch.zeros(4, most * group.size(), hidden).bfloat16()
    buffer = Buffer(group, low_latency_mode=True)
    for kind in ({}, {"use_fp8": False}, {"round_scale": True, "use_ue8m0": True}):
        for how in HOWS:
            call = buffer.low_latency_dispatch
            call(x, idx, most, experts, **kind, **how)
            names, received = launches(call, x, idx, most, experts, **kind, **how)
            handle, hook = received[2], received[4]
            if hook is not None:
                names += launches(hook)[0]
            for ids in (idx, idx.view(most, 2)):
                names += launches(buffer.low_latency_combine, out, ids, weights, handle)[0]
            assert names == []
    normal_buffer = Buffer(group)
    few, layout = launches(lambda: normal_buffer.get_dispatch_layout(idx, experts))
    assert len(few) <= 6, few
    arguments = dict(zip(LAYOUT, layout, strict=False))
    first = normal_buffer.dispatch(x, topk_idx=idx, topk_weights=weights, **arguments)
    arguments["is_token_in_rank"] = None  # on the CPU it would be checked
    sent = {"topk_idx": idx, "topk_weights": weights, **arguments}
    assert launches(normal_buffer.dispatch, x, **sent)[0] == []
    assert launches(normal_buffer.dispatch, x, handle=first[4])[0] == []
    assert launches(normal_buffer.combine, first[0], first[4])[0] == []


LAYOUT = (
    "num_tokens_per_rank",
    "num_tokens_per_rdma_rank",
    "num_tokens_per_expert",
    "is_token_in_rank",
)


def test_calls_launch_nothing_beside_epcomms_own() -> None:
    run(2, run_launches)
