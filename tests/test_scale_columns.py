"""Column-major scales of a dispatch: the numbers of row-major ones, in columns of 16 bytes."""

from typing import Any

import pytest
import torch

import launcher
from simulated import needs_simulator

# More scales than a warp has lanes, and more rows than one tile of a kernel.
HIDDEN, EXPERTS, MAX_TOKENS = 33 * 128, 6, 45
LAYOUTS = ("token", "expert", "padded")
KINDS = ("fp8", "fp8_ue8m0", "nvfp4")
# Device, and arguments of the Buffer.
CPU = ("cpu", {"transport": "cpu"})
LARGE = {"transport": "nvlink", "transport_options": {"path": "large"}}
NCCL = {"transport": "nccl", "transport_options": {"algorithm": "small"}}
SMALL = {"transport": "nvlink", "transport_options": {"path": "small"}}


def fill(*tensors: torch.Tensor) -> None:
    """0xa5 in every byte: what these tensors' memory is used for next must be written anew."""
    for tensor in tensors:
        tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0).view(
            torch.uint8
        ).fill_(0xA5)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    same: dict[int, torch.dtype] = {1: torch.uint8, 4: torch.int32}
    return tensor.view(same[tensor.itemsize])


def valid_rows(recv: Any, scales: torch.Tensor) -> list[torch.Tensor]:
    """What of received scales belongs to a token."""
    plan, counts = recv.plan, recv.tokens_per_expert.tolist()
    if plan.layout == "token":
        return [bits(scales)[: int(recv.num_tokens)]]
    if plan.layout == "padded":
        return [bits(scales)[e, :n] for e, n in enumerate(counts)]
    starts = plan.expert_offsets.tolist()
    return [bits(scales)[first : first + n] for first, n in zip(starts, counts, strict=False)]


def check_columns(recv: Any, row: Any) -> None:
    """recv has the rows and scales of `row`, the latter in columns."""
    scales, wanted = recv.x[1], row.x[1]
    assert scales.shape == wanted.shape and scales.dtype == wanted.dtype
    assert scales.stride(-2) == 1 and scales.stride(-1) >= scales.shape[-2]
    assert scales.stride(-1) * scales.element_size() % 16 == 0
    if recv.plan.layout == "padded":
        assert scales.stride(0) == scales.stride(-1) * scales.shape[-1]
    for part in (0, 1):
        got, expected = (valid_rows(one, one.x[part]) for one in (recv, row))
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)


def run_columns(group: Any, arguments: dict[str, Any], device: str, layout: str) -> None:
    import epcomm
    from epcomm import quant

    sizes = {"num_experts": EXPERTS, "hidden": HIDDEN, "topk": 3, "max_tokens": MAX_TOKENS}
    with epcomm.Buffer(group, **sizes, **arguments) as buf:
        rng = torch.Generator().manual_seed(group.rank())
        for round in range(4):
            x = torch.randn(MAX_TOKENS, HIDDEN, generator=rng).bfloat16().to(device)
            idx = torch.rand(MAX_TOKENS, EXPERTS, generator=rng).topk(3).indices
            idx[torch.rand(MAX_TOKENS, 3, generator=rng) < 0.2] = -1
            tokens = (MAX_TOKENS, 0, 30, 5)[(round + group.rank()) % 4]
            x, idx = x[:tokens], idx[:tokens].to(device)
            call: dict[str, Any] = {"layout": layout, "host_sync": round % 2 == 0}
            if layout == "expert":
                call["expert_alignment"] = (1, 4, 2, 8)[round]
            column: dict[str, Any] = {"scale_layout": "column"}
            # Of others, with more scales than a warp has lanes.
            wide = torch.arange(37 * tokens, dtype=torch.int32, device=device).view(tokens, 37)
            for kind in KINDS:
                pair = quant.quantize(x, kind)[:2]
                sent: list[Any] = [(x, {"quant": kind}), (pair, {})]
                if kind == "fp8":
                    sent.append(((pair[0], wide + 10000 * group.rank()), {}))
                for moved, how in sent:
                    row = buf.dispatch(moved, idx, **call, **how)
                    fill(*buf.dispatch(moved, idx, **call, **column, **how).x)
                    check_columns(buf.dispatch(moved, idx, **call, **column, **how), row)
                    check_columns(buf.dispatch(moved, plan=row.plan, **column, **how), row)
                    halves = buf.dispatch(
                        moved, idx, **call, **column, **how, return_recv_hook=True
                    )
                    assert halves.hook is not None
                    halves.hook()
                    check_columns(halves, row)
                    if group.rank() == 0:  # each rank chooses for itself
                        check_columns(buf.dispatch(moved, idx, **call, **column, **how), row)
                    else:
                        buf.dispatch(moved, idx, **call, **how)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_the_cpu(layout: str) -> None:
    launcher.pool().run(2, run_columns, {"transport": "cpu"}, "cpu", layout)


@needs_simulator
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arguments", [SMALL, LARGE, {"transport": "rdma"}])
def test_on_simulated_gpus(arguments: dict[str, Any], layout: str) -> None:
    launcher.pool("simulated").run(2, run_columns, arguments, "cpu", layout, timeout=200.0)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arguments", [SMALL, LARGE, NCCL])
def test_on_gpus(arguments: dict[str, Any], layout: str) -> None:
    pool = launcher.pool("cuda")
    pool.run(min(pool.size, 4), run_columns, arguments, "cuda", layout)
