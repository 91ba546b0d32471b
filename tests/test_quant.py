"""epcomm.quant: every code and every rounding against torch's types and the oracle."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import quant_reference as oracle
from epcomm import quant

QUANTS = ("fp8", "fp8_ue8m0", "nvfp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP = {"fp8": 128, "fp8_ue8m0": 128, "nvfp4": 16}
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def raw(t: torch.Tensor) -> np.ndarray:
    if t.numel() == 0:  # torch's empty tensors keep strides that views refuse
        return np.zeros((*t.shape[:-1], t.shape[-1] * t.element_size()), dtype=np.uint8)
    return t.cpu().contiguous().view(torch.uint8).numpy()


def all_bf16() -> torch.Tensor:
    """Every bf16 number, [512, 128]."""
    return (
        torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 128)
    )


def check_bits(x: torch.Tensor, name: str, global_scale: float | None = None) -> tuple:
    """quantize and dequantize of x against the oracle, bit for bit; NaN equals NaN."""
    made = quant.quantize(x, name, global_scale=global_scale)
    numbers = x.float().cpu().numpy()
    scale_of_all = np.float32(1.0)
    if name == "nvfp4":
        scale_of_all = oracle.global_scale(numbers)
        if global_scale is not None:
            scale_of_all = np.float32(global_scale)
        assert made[2].shape == (1,) and made[2].item() == scale_of_all
    q, scales = oracle.quantise(numbers, name, scale_of_all)
    np.testing.assert_array_equal(raw(made[0]), q)
    if name == "fp8":
        np.testing.assert_array_equal(made[1].cpu().numpy(), scales.view(np.float32))
        special = made[1].isnan()
        assert (raw(made[1][special]).view(np.uint32) == 0x7FC00000).all()
    else:
        np.testing.assert_array_equal(raw(made[1]), scales)
    back = oracle.dequantise(q, scales, name, scale_of_all)
    np.testing.assert_array_equal(quant.dequantize(*made).cpu().numpy(), back)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = torch.from_numpy(back).to(dtype).float().numpy()
        again = quant.dequantize(*made, dtype=dtype)
        assert again.dtype == dtype
        np.testing.assert_array_equal(again.float().cpu().numpy(), rounded)
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", QUANTS)
def test_every_bf16_number_beside_others(name: str, device: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.permutation(1 << 16).astype(np.uint16).view(np.int16)
    shuffled = torch.from_numpy(bits).view(torch.bfloat16).view(-1, 512)
    check_bits(shuffled.to(device), name)
    ordered = all_bf16()  # neighbours share a group: scales of all sizes
    check_bits(ordered.to(device), name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTS)
def test_random_rows(name: str, dtype: torch.dtype, device: str) -> None:
    rng = torch.Generator().manual_seed(1)
    for rows, groups in ((1, 2), (3, 6), (7, 14), (33, 24)):
        x = torch.randn(rows, groups * GROUP[name], generator=rng)
        x *= 10.0 ** torch.randint(-6, 4, (rows, 1), generator=rng)
        x[0, : GROUP[name]] = 0.0
        check_bits(x.to(dtype).to(device), name)
        if name == "nvfp4":
            check_bits(x.to(dtype).to(device), name, global_scale=0.03)
            check_bits(x.to(dtype).to(device), name, global_scale=1e-7)  # scales saturate


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", QUANTS)
def test_tiny_and_huge_rows(name: str, device: str) -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, 1e-40, 5e-36, 5.3e-36, 1e-32, 1e30, 3.4e38, -3.4e38])
    x = values.repeat_interleave(128).view(1, -1) * torch.linspace(0.3, 1, 1280)
    check_bits(x.to(device), name)
    for row in values:
        check_bits((torch.linspace(-1, 1, 512) * row).view(1, -1).to(device), name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", QUANTS)
def test_a_group_that_is_not_finite_stays_detectable(name: str, bad: float, device: str) -> None:
    group = GROUP[name]
    x = torch.randn(4, 4 * group, generator=torch.Generator().manual_seed(2)).bfloat16()
    good = quant.dequantize(*check_bits(x.to(device), name)).cpu()
    assert good.isfinite().all()
    x[2, group + 3] = bad
    spoiled = quant.dequantize(*check_bits(x.to(device), name)).cpu()
    touched = torch.zeros_like(good, dtype=torch.bool)
    touched[2, group : 2 * group] = True
    assert not spoiled[touched].isfinite().any()
    if name != "nvfp4":  # there the global scale may have come from what is no longer finite
        assert torch.equal(spoiled[~touched], good[~touched])
    assert spoiled[~touched].isfinite().all()


@pytest.mark.parametrize("name", QUANTS)
def test_no_element_is_off_by_more_than_half_a_step(name: str) -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(4))
    back = quant.dequantize(*quant.quantize(x, name))
    groups, error = x.view(-1, GROUP[name]), (back - x).abs().view(-1, GROUP[name])
    amax = groups.abs().amax(dim=1, keepdim=True)
    if name == "nvfp4":  # widest step: 2 of 6; the scale is off by up to 2^-4
        bound = amax * (1 + 2**-4) / 6
    else:  # 3 bits of mantissa; the least step is 2^-9 of the scale, which may be twice amax / 448
        bound = torch.maximum(groups.abs() * 2.0**-4, amax / 448 * 2.0**-9) * 1.00001
    assert (error <= bound).all()
    assert error.max() > 0


# Against torch's own types.


@pytest.mark.parametrize("name", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3_rounds_as_torch(name: str, dtype: torch.dtype) -> None:
    x = all_bf16().flatten()
    x = x[x.float().abs() <= 448].float()
    middle = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (middle[1:] + middle[:-1]) / 2
    ties = torch.cat(
        [middle, middle.nextafter(torch.tensor(9e9)), middle.nextafter(torch.tensor(0.0))]
    )
    x = torch.cat([x, ties, -ties]).to(dtype)
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.cat([torch.full((len(x), 1), 448.0, dtype=dtype), x], dim=1).contiguous()
    q, scales = quant.quantize(x, name)
    assert (scales == (1.0 if name == "fp8" else 127)).all()
    assert torch.equal(q.view(torch.uint8), x.float().to(torch.float8_e4m3fn).view(torch.uint8))


def test_all_e4m3_codes_decode_as_in_torch() -> None:
    q = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
    back = quant.dequantize(q, torch.ones(1, 2))
    assert torch.equal(back.nan_to_num(999.0), q.float().nan_to_num(999.0))
    assert torch.equal(back.signbit(), q.float().signbit())


def test_all_ue8m0_codes_decode_as_in_torch() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    q = torch.ones(64, 512).to(torch.float8_e4m3fn)
    back = quant.dequantize(q, codes.view(64, 4).view(torch.int32))[:, ::128].flatten()
    expected = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(back.nan_to_num(-1.0), expected.nan_to_num(-1.0))


def test_all_e2m1_codes() -> None:
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, the first element in the low half."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-v for v in values]
    x = torch.tensor([values, values[::-1]]).view(1, 32)
    q, scales, g = quant.quantize(x, "nvfp4", global_scale=1.0)
    assert bytes(q.flatten().tolist()).hex() == "1032547698badcfeefcdab8967452301"
    assert q.view(torch.float4_e2m1fn_x2).shape == (1, 16)
    assert scales.float().tolist() == [[1.0, 1.0]]
    back = quant.dequantize(q, scales, g)
    assert torch.equal(back, x) and torch.equal(back.signbit(), x.signbit())


@pytest.mark.parametrize(
    ("x", "expected"), [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4)]
)
def test_ties_of_e2m1_go_to_the_even_code(x: float, expected: float) -> None:
    row = torch.zeros(1, 32)
    row[0, :4] = torch.tensor([6.0, x, -x, np.nextafter(np.float32(x), np.float32(0))])
    back = quant.dequantize(*quant.quantize(row, "nvfp4", global_scale=1.0))
    assert back[0, :4].tolist() == [6.0, expected, -expected, max(v for v in oracle.E2M1 if v < x)]


def test_elements_and_scales_saturate() -> None:
    x = torch.tensor([[1e6, -1e6, *[1.0] * 30]])
    back = quant.dequantize(*quant.quantize(x, "nvfp4", global_scale=1.0))
    assert back[0, :3].tolist() == [6.0 * 448, -6.0 * 448, 0.0]


# Layouts of scales.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 130])
@pytest.mark.parametrize("name", QUANTS)
def test_column_major_scales(name: str, tokens: int, device: str) -> None:
    x = torch.randn(tokens, 640).bfloat16().to(device)
    q, scales, *rest = quant.quantize(x, name)
    column = quant.quantize(x, name, scale_layout="column")[1]
    for made in (column, quant.column_major(scales)):
        assert made.shape == scales.shape and made.dtype == scales.dtype
        np.testing.assert_array_equal(raw(made), raw(scales))
        assert made.stride(0) == 1 and made.stride(1) >= tokens
        assert made.stride(1) * made.element_size() % 16 == 0
    back = quant.dequantize(q, column, *rest)
    assert torch.equal(back, quant.dequantize(q, scales, *rest))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 64), (1, 32), (128, 64), (129, 96), (300, 224)])
def test_swizzled_scales(tokens: int, hidden: int, device: str) -> None:
    x = torch.randn(tokens, hidden).bfloat16().to(device)
    q, scales, g = quant.quantize(x, "nvfp4")
    _, swizzled, _ = quant.quantize(x, "nvfp4", scale_layout="swizzled")
    np.testing.assert_array_equal(raw(swizzled), oracle.swizzle(raw(scales)))
    assert torch.equal(quant.dequantize(q, swizzled, g), quant.dequantize(q, scales, g))


@pytest.mark.parametrize("device", DEVICES)
def test_a_global_scale_for_each_row(device: str) -> None:
    x = torch.randn(6, 64).to(device)
    q, scales, _ = quant.quantize(x, "nvfp4", global_scale=0.01)
    g = torch.arange(1.0, 7.0, device=device)
    back = quant.dequantize(q, scales.view(torch.uint8), g)
    assert torch.equal(back, quant.dequantize(q, scales, 1.0) * g[:, None])
    padded = quant.dequantize(q.view(2, 3, 32), scales.view(2, 3, 4), g.view(2, 3))
    assert torch.equal(padded, back.view(2, 3, 64))


def test_old_names() -> None:
    x = torch.randn(2, 256)
    q, scales = quant.quantize_fp8(x)
    assert torch.equal(quant.dequantize_fp8(q, scales), quant.dequantize(*quant.quantize(x, "fp8")))
    assert quant.quantize_fp8(x, ue8m0=True)[1].dtype == torch.int32


X = torch.ones(2, 256)
Q, S = quant.quantize(X, "fp8")
Q4, S4, G4 = quant.quantize(X, "nvfp4")
MISUSE: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    (lambda: quant.quantize(X, "int3"), ("quant", "int3", "nvfp4")),
    (lambda: quant.quantize(X[:, :100].contiguous(), "fp8"), ("hidden", "100", "128")),
    (lambda: quant.quantize(X[:, :48].contiguous(), "nvfp4"), ("hidden", "48", "32")),
    (lambda: quant.quantize(X.t(), "fp8"), ("strides",)),
    (lambda: quant.quantize(X.double(), "fp8"), ("float64", "float32")),
    (lambda: quant.quantize(X, "fp8", scale_layout="swizzled"), ("scale_layout", "nvfp4")),
    (lambda: quant.quantize(X, "fp8", global_scale=1.0), ("global_scale", "fp8")),
    (lambda: quant.quantize(X, "nvfp4", global_scale=0.0), ("global_scale", "0.0")),
    (lambda: quant.quantize(X, "nvfp4", global_scale=float("nan")), ("global_scale", "nan")),
    (lambda: quant.quantize(X, "nvfp4", global_scale=-G4), ("global_scale", "-0.0")),
    (lambda: quant.quantize(X, "nvfp4", global_scale=G4.double()), ("global_scale", "float64")),
    (lambda: quant.dequantize(Q, S[:, :1]), ("scales", "[2, 1]", "[2, 2]")),
    (lambda: quant.dequantize(Q, S.double()), ("float64", "int32")),
    (lambda: quant.dequantize(Q4, S4), ("global_scale", "missing")),
    (lambda: quant.dequantize(Q, S, 1.0), ("global_scale", "given")),
    (lambda: quant.dequantize(Q4, S4, torch.ones(3)), ("global_scale", "3", "2")),
    (lambda: quant.dequantize(Q, S, dtype=torch.float64), ("dtype", "float64")),
]


@pytest.mark.parametrize("case", range(len(MISUSE)))
def test_misuse_is_named(case: int) -> None:
    call, words = MISUSE[case]
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUANTS)
def test_gpu_gives_the_bits_of_the_cpu(name: str) -> None:
    assert importlib.util.find_spec("epcomm._cuda") is not None
    rng = torch.Generator().manual_seed(3)
    for dtype in DTYPES:
        bits = torch.randint(-(2**31), 2**31 - 1, (257, 7168 * dtype.itemsize // 4), generator=rng)
        x = bits.int().view(dtype)  # any bits: NaN, infinities, subnormal numbers
        for mine, theirs in zip(
            quant.quantize(x, name), quant.quantize(x.cuda(), name), strict=True
        ):
            np.testing.assert_array_equal(raw(mine), raw(theirs))
