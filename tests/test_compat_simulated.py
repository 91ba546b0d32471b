"""deep_ep's interface on nvlink, on simulated GPUs: results, and what a call costs beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import launcher
import test_compat_low_latency as low_latency
import test_compat_normal as normal
from simulated import load, needs_simulator

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
    """What a GPU would be given: operations of torch by name, kernels and copies of epcomm."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._simulator = load()
        self._before = self._simulator.issued()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not any(view in name for view in VIEWS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        after = self._simulator.issued()
        for kind, first, last in zip(("kernel", "copy"), self._before, after, strict=True):
            self.names += [kind] * (last - first)


def launches(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[str], Any]:
    with Launches() as seen:
        result = call(*args, **kwargs)
    return seen.names, result


def run_low_latency_launches(group: Any) -> None:
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
            for _ in range(2):  # the first makes the Buffer
                names, received = launches(call, x, idx, most, experts, **kind, **how)
                handle, hook = received[2], received[4]
                if hook is not None:
                    assert launches(hook)[0] == ["kernel"]
            assert names == ["kernel"], names
            for ids in (idx, idx.view(most, 2)):
                names, result = launches(
                    buffer.low_latency_combine, out, ids, weights, handle, **how
                )
                assert names == ["kernel"], names
                if result[2] is not None:
                    assert launches(result[2])[0] == ["kernel"]


def run_normal_launches(group: Any) -> None:
    """Each call launches what epcomm's own call launches."""
    import epcomm
    from epcomm.compat.deep_ep import Buffer

    tokens, experts, hidden = 600, 4 * group.size(), 512
    x = torch.randn(tokens, hidden).bfloat16()
    idx = torch.arange(2 * tokens).view(tokens, 2) % experts
    weights = torch.rand(tokens, 2)
    own = epcomm.Buffer(
        group,
        num_experts=experts,
        hidden=hidden,
        topk=2,
        max_tokens=1024,
        transport="nvlink",
    )
    plan = own.dispatch(x, idx, weights).plan
    buffer = Buffer(group)
    layout = dict(zip(LAYOUT, buffer.get_dispatch_layout(idx, experts), strict=False))
    first = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, **layout)
    layout["is_token_in_rank"] = None  # on the CPU it would be checked
    sent = {"topk_idx": idx, "topk_weights": weights, **layout}
    y = first[0].clone()
    pairs = [
        (lambda: buffer.dispatch(x, **sent), lambda: own.dispatch(x, idx, weights)),
        (lambda: buffer.dispatch(x, handle=first[4]), lambda: own.dispatch(x, plan=plan)),
        (lambda: buffer.combine(y, first[4]), lambda: own.combine(y, plan)),
    ]
    for shim, native in pairs:
        names = launches(shim)[0]
        assert "kernel" in names
        assert names == launches(native)[0]


LAYOUT = (
    "num_tokens_per_rank",
    "num_tokens_per_rdma_rank",
    "num_tokens_per_expert",
    "is_token_in_rank",
)


def test_a_low_latency_call_is_one_kernel() -> None:
    run(2, run_low_latency_launches)


def test_normal_calls_launch_what_epcomms_own_launch() -> None:
    run(2, run_normal_launches)


# Ranks, experts, tokens, top-k: one expert a rank; a rank with many; nodes; no tokens; several
# rounds of ids per thread; several tiles of tokens.
LAYOUTS = [
    (2, 2, 33, 1),
    (3, 12, 5, 8),
    (4, 16, 0, 4),
    (1, 7, 100, 3),
    (16, 48, 70, 6),
    (24, 24, 40, 2),
    (4, 64, 1100, 9),
    (2, 4096, 300, 2),
    (2, 10000, 65, 2),
]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("ranks", "experts", "tokens", "topk"), LAYOUTS)
def test_dispatch_layout(ranks: int, experts: int, tokens: int, topk: int, dtype: Any) -> None:
    from epcomm.compat.deep_ep import layout

    simulator = load()
    generator = torch.Generator().manual_seed(tokens)
    idx = torch.randint(-1, experts, (tokens, topk), generator=generator, dtype=dtype)
    if topk > 1:
        idx[::3, 1] = idx[::3, 0]  # named twice
    wrong = torch.randint(0, 9, (tokens, topk), generator=generator)
    idx[wrong == 0] = -1
    limits = torch.iinfo(dtype)
    for kind, value in enumerate((experts, -2, limits.min, limits.max), 1):
        idx[wrong == kind] = value
    before = simulator.issued()
    made = layout.by_kernel(simulator, idx, experts, ranks, 0)
    simulator.synchronize()
    assert [b - a for a, b in zip(before, simulator.issued(), strict=True)] == [1, 0]
    wanted = layout_of(idx, experts, ranks)
    for got in (made, layout.dispatch_layout(idx, experts, ranks)):
        for ours, theirs in zip(got, wanted, strict=True):
            if theirs is None:
                assert ours is None
                continue
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            # As bytes: a bool that is neither 0 nor 1 would compare as True.
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def layout_of(idx: torch.Tensor, experts: int, ranks: int) -> tuple[torch.Tensor | None, ...]:
    """What deep_ep says of a routing, token by token."""
    local, nodes = experts // ranks, ranks // 8 if ranks % 8 == 0 else 0
    per_rank, per_node, per_expert = [0] * ranks, [0] * nodes, [0] * experts
    in_rank = torch.zeros(len(idx), ranks, dtype=torch.bool)
    for token, ids in enumerate(idx.tolist()):
        chosen = {e for e in ids if 0 <= e < experts}
        told = {e // local for e in chosen}
        in_rank[token, sorted(told)] = True
        counted = (per_expert, chosen), (per_rank, told), (per_node, {r // 8 for r in told})
        for counts, hit in counted:
            for i in hit if counts else ():
                counts[i] += 1
    made = [torch.tensor(counts, dtype=torch.int32) for counts in (per_rank, per_node, per_expert)]
    return made[0], made[1] if nodes > 1 else None, made[2], in_rank


def test_dispatch_layout_refuses_what_it_cannot_count() -> None:
    from epcomm.compat.deep_ep import layout

    idx = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_experts is 12288, 6144 on each rank"):
        layout.by_kernel(load(), idx, 12288, 2, 0)
    for bad, error in ((idx.float(), TypeError), (idx[0], ValueError)):
        with pytest.raises(error, match="topk_idx"):
            layout.dispatch_layout(bad, 4, 2)
