"""Quantised calls beyond the conformance suite: the bits of epcomm.quant, scales, mixed ranks."""

from typing import Any

import numpy as np
import pytest
import torch

import launcher
from test_mismatch import NUM_RANKS, ODD, _check, _told
from test_misuse import EXPERTS, MAX_TOKENS, Setup

HIDDEN = 640
KINDS = ("fp8", "fp8_ue8m0", "nvfp4")


def setup_of(group: Any) -> tuple[Setup, torch.Tensor, torch.Tensor]:
    """A Buffer, rows whose size differs between ranks, and expert ids."""
    setup = Setup(group, hidden=HIDDEN)
    x = torch.randn(MAX_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(group.rank()))
    x = (x * 10.0 ** group.rank()).bfloat16()
    x[1] = 0.0
    return setup, x, torch.arange(2 * MAX_TOKENS).view(MAX_TOKENS, 2) % EXPERTS


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return False
    if got.numel() == 0:
        return True
    ours, theirs = (t.clone(memory_format=torch.contiguous_format) for t in (got, wanted))
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def run_bits(group: Any, kind: str, layout: str) -> None:
    from epcomm import quant

    setup, x, idx = setup_of(group)
    exact = setup.buf.dispatch(x, idx, layout=layout)
    recv = setup.buf.dispatch(x, idx, layout=layout, quant=kind)
    if kind != "nvfp4":
        assert recv.global_scale is None
        for got, wanted in zip(recv.x, quant.quantize(exact.x, kind), strict=True):
            assert same(got, wanted)
    else:
        # Each rank's rows come with the global scale of that rank.
        told = sorted(set(recv.global_scale.tolist()))
        assert len(told) == group.size()
        for scale in told:
            rows = recv.global_scale == scale
            got = [part[rows] for part in (recv.x[0], recv.x[1].view(torch.uint8))]
            wanted = quant.quantize(exact.x[rows], kind, global_scale=scale)
            assert same(got[0], wanted[0]) and same(got[1], wanted[1].view(torch.uint8))
    back = quant.dequantize(*recv.x, recv.global_scale)
    # amax of a group is at most 2^3 standard deviations; half a step of e2m1 is amax / 6.
    size = exact.x.float().view(len(back), -1, 16).abs().amax(dim=2, keepdim=True)
    error = (back - exact.x.float()).view(len(back), -1, 16).abs()
    assert (error <= size * (0.18 if kind == "nvfp4" else 0.25)).all()

    # Quantised before, by the caller, and on the way: the others see no difference.
    if kind != "nvfp4" and group.rank() == 0:
        mixed = setup.buf.dispatch(quant.quantize(x, kind), idx, layout=layout)
    else:
        mixed = setup.buf.dispatch(x, idx, layout=layout, quant=kind)
    assert same(mixed.x[0], recv.x[0]) and same(mixed.x[1], recv.x[1])
    setup.buf.destroy()


@pytest.mark.parametrize("layout", ["token", "expert"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_quantising_before(kind: str, layout: str) -> None:
    launcher.pool().run(2, run_bits, kind, layout)


def run_packed_pairs(group: Any) -> None:
    """What others have packed passes through, any bytes, with scales of any type and size."""
    setup, _, idx = setup_of(group)
    rng = np.random.default_rng(group.rank())

    def any_bits(width: int, dtype: torch.dtype) -> torch.Tensor:
        size = (MAX_TOKENS, width * dtype.itemsize)
        return torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)).view(dtype)

    for q, scales in (
        (any_bits(HIDDEN // 2, torch.uint8), any_bits(HIDDEN // 16, torch.float8_e4m3fn)),
        (any_bits(HIDDEN // 2, torch.uint8), any_bits(HIDDEN // 16, torch.uint8)),
        (any_bits(48, torch.uint8), any_bits(1, torch.uint8)),
        (any_bits(HIDDEN, torch.float8_e4m3fn), any_bits(HIDDEN // 128, torch.float32)),
        (any_bits(HIDDEN, torch.float8_e4m3fn), any_bits(2, torch.int32)),
    ):
        for part in ((q, scales), (q, scales.flip(0).contiguous())):
            recv = setup.buf.dispatch(part, idx)
            mine = recv.plan.num_recv_tokens // group.size() * group.rank()
            sent = [t for t in range(MAX_TOKENS) if int((idx[t] // 3 == group.rank()).sum()) > 0]
            rows = slice(mine, mine + len(sent))
            for got, whole in zip(recv.x, part, strict=True):
                assert same(got[rows], whole[sent])
    setup.buf.destroy()


def test_packed_pairs_pass_through() -> None:
    launcher.pool().run(2, run_packed_pairs)


def run_combine_error(group: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Largest and mean error of a quantised combine, in units of the largest partial element."""
    setup = Setup(group, hidden=HIDDEN, dtype=torch.float32)
    idx = torch.stack([torch.randperm(EXPERTS)[:4] for _ in range(MAX_TOKENS)])
    weights = torch.rand(MAX_TOKENS, 4).softmax(dim=1)
    recv = setup.buf.dispatch(torch.ones(MAX_TOKENS, HIDDEN), idx, weights, layout="expert")
    out = torch.randn(recv.x.shape).to(dtype)
    exact = setup.buf.combine(out.float(), recv.plan, topk_weights=weights)
    y = setup.buf.combine(out, recv.plan, topk_weights=weights, quant="fp8")
    assert y.dtype == dtype
    error = (y.float() - exact).abs()
    setup.buf.destroy()
    return float(error.max() / exact.abs().max()), float((error / exact.std()).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_of_a_quantised_combine(dtype: torch.dtype) -> None:
    for most, mean in launcher.pool().run(3, run_combine_error, dtype):
        # Half a step of e4m3 is at most amax / 28, of each of up to 3 partial rows.
        assert 0.001 < most < 3 / 28
        assert 0.005 < mean < 0.04  # 2.2 % of a normal number on average


def run_mixed_combine(group: Any) -> Any:
    setup = Setup(group, hidden=HIDDEN)
    kind = "fp8" if group.rank() == ODD else None
    told = _told(lambda: setup.combine(quant=kind))
    assert torch.equal(setup.combine(quant="fp8"), setup.combine())  # of ones: exact in e4m3
    setup.buf.destroy()
    return told


def test_ranks_differ_in_the_quantisation_of_a_combine() -> None:
    _check(launcher.pool().run(NUM_RANKS, run_mixed_combine), "quant", "fp8", "none")


def run_nothing(group: Any, kind: str) -> None:
    """No tokens at all, and tokens that go nowhere."""
    setup = Setup(group, hidden=HIDDEN)
    for tokens in (0, 3):
        x, idx = torch.ones(tokens, HIDDEN), torch.full((tokens, 2), -1)
        recv = setup.buf.dispatch(x.bfloat16(), idx, quant=kind)
        assert len(recv.x[0]) == len(recv.x[1]) == 0
        y = setup.buf.combine(torch.empty(0, HIDDEN).bfloat16(), recv.plan, quant="fp8")
        assert torch.equal(y, torch.zeros(tokens, HIDDEN).bfloat16())
    setup.buf.destroy()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_quantise(kind: str) -> None:
    launcher.pool().run(2, run_nothing, kind)
