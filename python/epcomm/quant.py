"""Quantised rows: fp8, fp8 with UE8M0 scales and NVFP4, on the CPU and on GPUs, with the same bits.

    q, scales = quantize(x, "fp8")
    q, scales, global_scale = quantize(x, "nvfp4")
    x = dequantize(q, scales, global_scale)

docs/quantisation.md has the formulas, their sources, the rounding and what zero, NaN and infinite
values become. T = rows, H = hidden.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import _core, native

ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_LAYOUTS = ("row", "column", "swizzled")
MIN_GLOBAL_SCALE = 2.0**-117
"""Least global scale: the product with a group's scale is then a normal number."""

_COLUMN_ALIGNMENT = 16  # bytes; a TMA copy needs strides that are multiples of it


@dataclass(frozen=True)
class Format:
    """One kind of quantised row.

    Attributes:
        name: as `quantize` and `Buffer.dispatch` take it.
        q_dtype: of the elements; a uint8 holds two.
        scale_dtype: of the scales.
        per_scale: elements that one entry of the scales covers.
        global_scale: whether there is also one fp32 scale for all rows.
    """

    name: str
    q_dtype: torch.dtype
    scale_dtype: torch.dtype
    per_scale: int
    global_scale: bool = False

    def layout(self, hidden: int) -> Any:
        """Sizes of a row. ValueError where hidden does not divide into groups."""
        return _layout(self.name, hidden)

    def num_scales(self, hidden: int) -> int:
        """Entries of a row's scales."""
        return int(self.layout(hidden).scale_bytes) // self.scale_dtype.itemsize

    def moved(self, hidden: int) -> tuple[tuple[torch.dtype, int], ...]:
        """Type and width of the tensors that a dispatch moves: q, and scales as bytes travel."""
        return _moved(self.name, hidden)


@functools.lru_cache(maxsize=64)
def _layout(quant: str, hidden: int) -> Any:
    return _core.quant_layout(getattr(_core.Quant, quant), hidden)


@functools.lru_cache(maxsize=64)
def _moved(quant: str, hidden: int) -> tuple[tuple[torch.dtype, int], ...]:
    fmt, layout = FORMATS[quant], _layout(quant, hidden)
    scales = torch.uint8 if fmt.global_scale else fmt.scale_dtype
    return (
        (fmt.q_dtype, layout.row_bytes),
        (scales, layout.wire_scale_bytes // scales.itemsize),
    )


FORMATS = {
    f.name: f
    for f in (
        Format("fp8", torch.float8_e4m3fn, torch.float32, 128),
        Format("fp8_ue8m0", torch.float8_e4m3fn, torch.int32, 512),
        Format("nvfp4", torch.uint8, torch.float8_e4m3fn, 16, global_scale=True),
    )
}
"""Every quantisation by its name."""


def quantize(
    x: torch.Tensor,
    quant: str,
    *,
    global_scale: torch.Tensor | float | None = None,
    scale_layout: str = "row",
) -> tuple[torch.Tensor, ...]:
    """Quantises rows, to nearest, ties to even.

    Args:
        x: [T, H] bfloat16, float16 or float32, contiguous, on the CPU or a GPU. H is a multiple of
            128 ("nvfp4": of 32).
        quant: "fp8": e4m3, scale = amax / 448 per 128 channels. "fp8_ue8m0": the scale is rounded
            up to a power of two. "nvfp4": e2m1, scale e4m3(amax / (6 * global_scale)) per 16.
        global_scale: "nvfp4": a positive number or float32 tensor of one element (x = q * scale *
            global_scale). None: the largest finite magnitude of x / (448 * 6), which uses the whole
            range; on a GPU it is found without a host wait.
        scale_layout: "row"; "column": stride 1 over rows, columns 16 bytes aligned, as DeepGEMM
            reads them; "swizzled" ("nvfp4"): tiles of 128 x 4, as block-scaled GEMMs read them.

    Returns:
        (q, scales), and for "nvfp4" (q, scales, global_scale):
        q: float8_e4m3fn [T, H]; "nvfp4": uint8 [T, H / 2], the first of two elements in the low
            half.
        scales: float32 [T, H / 128]; "fp8_ue8m0": int32 [T, ceil(H / 512)], four biased exponents
            each, the first lowest; "nvfp4": float8_e4m3fn [T, H / 16]. "column": the same shape,
            other strides. "swizzled": [ceil(T / 128) * ceil(H / 64) * 512].
        global_scale: float32 [1].

    Raises:
        ValueError, TypeError: a bad argument.
    """
    fmt = _format(quant)
    _check_rows(x, fmt)
    if scale_layout not in SCALE_LAYOUTS or (scale_layout == "swizzled" and quant != "nvfp4"):
        raise ValueError(
            f"scale_layout is {scale_layout!r}; expected 'row' or 'column', or 'swizzled' for nvfp4"
        )
    if global_scale is not None and not fmt.global_scale:
        raise ValueError(f"global_scale is given; quant {quant!r} has none")
    tokens, hidden = x.shape
    q = x.new_empty((tokens, fmt.layout(hidden).row_bytes), dtype=fmt.q_dtype)
    scales = _empty_scales(fmt, tokens, hidden, scale_layout, x.device)
    with _on(x.device) as stream:
        made = make_global_scale(x, global_scale) if fmt.global_scale else None
        args = _arguments(fmt, x, q, made, stream)
        _set_strides(args, scales)
        module_of(x).quantize(args)
    return (q, scales) if made is None else (q, scales, made)


def dequantize(
    q: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor | float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Turns quantised rows back: x = q * scale (* global_scale), in fp32, rounded once to dtype.

    Args:
        q: [..., H] float8_e4m3fn or [..., H / 2] uint8, contiguous.
        scales: what `quantize` or a dispatch gave beside q, in any strides; its dtype tells the
            format. One dimension: swizzled.
        global_scale: for uint8 (NVFP4): a number, one element, or one element per row ([...], as
            `Recv.global_scale`).
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        [..., H] of dtype.

    Raises:
        ValueError, TypeError: a bad argument.
    """
    fmt = _format_of(q, scales, global_scale)
    if dtype not in ROW_DTYPES:
        raise ValueError(f"dtype is {dtype}; expected float32, bfloat16 or float16")
    if not q.is_contiguous() or scales.device != q.device:
        raise ValueError("q must be contiguous, and scales on the device of q")
    hidden = q.shape[-1] * (2 if fmt.q_dtype == torch.uint8 else 1)
    shape, tokens = (*q.shape[:-1], hidden), q.shape[:-1].numel()
    width = fmt.num_scales(hidden)
    if scales.dim() == 1 and fmt.global_scale:
        wanted: tuple[int, ...] = (-(-tokens // 128) * -(-width // 4) * 512,)
    else:
        wanted = (*q.shape[:-1], width)
    if tuple(scales.shape) != wanted:
        raise ValueError(f"scales has shape {list(scales.shape)}; expected {list(wanted)}")
    if scales.dim() > 1:
        scales = scales.reshape(tokens, width)
    x = q.new_empty((tokens, hidden), dtype=dtype)
    with _on(q.device) as stream:
        made = None
        if fmt.global_scale:
            made = _as_tensor(global_scale, q.device).reshape(-1)
            if made.numel() not in (1, tokens):
                raise ValueError(
                    f"global_scale has {made.numel()} elements; expected 1 or {tokens}, one per row"
                )
        args = _arguments(fmt, x, q, made, stream)
        if made is not None and made.numel() > 1:
            args.global_stride = made.stride(0)
        _set_strides(args, scales)
        module_of(q).dequantize(args)
    return x.view(shape)


def quantize_fp8(x: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, ...]:
    """`quantize` to "fp8", or with `ue8m0` to "fp8_ue8m0"."""
    return quantize(x, "fp8_ue8m0" if ue8m0 else "fp8")


def dequantize_fp8(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`dequantize` to float32."""
    return dequantize(q, scales)


def column_major(scales: torch.Tensor) -> torch.Tensor:
    """A copy of scales [..., T, n] with stride 1 over rows and columns that start on 16 bytes.

    The layout of scales that DeepGEMM's kernels read (its `get_mn_major_tma_aligned_tensor`).
    """
    out = empty_columns(scales.dtype, scales.shape, scales.device)
    # Bytes, because torch cannot copy every float8 type.
    size = scales.element_size()
    same = {1: torch.uint8, 4: torch.int32}[size]
    out.view(same).copy_(scales.view(same))
    return out


# What Buffer needs.


def column_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the memory of column-major scales [..., T, n]: [..., n, T and what aligns it]."""
    *groups, tokens, width = shape
    per_column = _COLUMN_ALIGNMENT // dtype.itemsize
    return (*groups, width, max(1, -(-tokens // per_column)) * per_column)


def columns_of(raw: torch.Tensor, tokens: int) -> torch.Tensor:
    """Scales [..., T, n] in memory of `column_shape`."""
    return raw.transpose(-1, -2)[..., :tokens, :]


def empty_columns(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Column-major scales [..., T, n] to be written; what no row owns is 0."""
    raw = torch.empty(column_shape(dtype, shape), dtype=dtype, device=device)
    tokens = shape[-2]
    if raw.shape[-1] > tokens:
        raw.view(torch.uint8)[..., tokens * dtype.itemsize :].zero_()
    return columns_of(raw, tokens)


def make_global_scale(x: torch.Tensor, given: torch.Tensor | float | None) -> torch.Tensor:
    """The global scale of rows, float32 [1]: the given one, or from x, on the current stream."""
    if given is not None:
        return _as_tensor(given, x.device).reshape(1)
    out = torch.empty(1, dtype=torch.float32, device=x.device)
    module = module_of(x)
    dtype = getattr(module.Dtype, str(x.dtype).removeprefix("torch."))
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    module.global_scale(dtype, x.data_ptr(), x.numel(), out.data_ptr(), stream)
    return out


def quantize_to_move(
    x: torch.Tensor, quant: str, global_scale: torch.Tensor | None, num_sms: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and scales as `Format.moved` says, on the current stream."""
    fmt = FORMATS[quant]
    tokens, hidden = x.shape
    q, scales = (x.new_empty((tokens, w), dtype=d) for d, w in fmt.moved(hidden))
    with _on(x.device) as stream:
        args = _arguments(fmt, x, q, global_scale, stream)
        args.num_sms = num_sms
        args.wire = True
        _set_strides(args, scales)
        module_of(x).quantize(args)
    return q, scales


def split_moved(scales: torch.Tensor, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and global scale of each row, as views of what a dispatch of NVFP4 rows delivered."""
    width = FORMATS["nvfp4"].num_scales(hidden)
    return scales[..., :width].view(torch.float8_e4m3fn), scales.view(torch.float32)[..., -1]


def check_global_scale(name: str, value: torch.Tensor | float, device: torch.device) -> None:
    """Checks a global scale as far as that goes without waiting for a GPU."""
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.float32 or value.numel() != 1 or value.device != device:
            raise ValueError(
                f"{name} is {value.dtype} {list(value.shape)} on {value.device}; expected one "
                f"element of torch.float32 on {device}"
            )
        if value.is_cuda:
            return
        value = float(value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number or a tensor")
    if not MIN_GLOBAL_SCALE <= value < float("inf"):
        raise ValueError(f"{name} is {value}; expected a finite number of at least 2**-117")


# Steps.


def module_of(x: torch.Tensor) -> Any:
    """The extension module that works on a tensor's device."""
    if not x.is_cuda:
        return _core
    cuda = native.load_cuda()
    if cuda is None:
        raise ValueError(f"x is on {x.device}, but this build has no GPU code: {_core.cuda_status}")
    return cuda


@contextlib.contextmanager
def _on(device: torch.device) -> Any:
    """Makes a GPU current; gives the address of its current stream, 0 on the CPU."""
    if device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _format(quant: Any) -> Format:
    if quant not in FORMATS:
        raise ValueError(f"quant is {quant!r}; expected one of {', '.join(map(repr, FORMATS))}")
    return FORMATS[quant]


def _format_of(q: Any, scales: Any, global_scale: Any) -> Format:
    """The format that a pair is in, by its dtypes."""
    if not isinstance(q, torch.Tensor) or not isinstance(scales, torch.Tensor):
        raise TypeError("q and scales must be tensors")
    for fmt in FORMATS.values():
        same = scales.dtype == fmt.scale_dtype or (fmt.global_scale and scales.dtype == torch.uint8)
        if q.dtype == fmt.q_dtype and same:
            if fmt.global_scale != (global_scale is not None):
                need = "is missing" if fmt.global_scale else "is given"
                raise ValueError(f"global_scale {need}; quant {fmt.name!r} says otherwise")
            return fmt
    raise ValueError(
        f"q is {q.dtype} and scales {scales.dtype}; expected one of "
        + ", ".join(f"{f.q_dtype} with {f.scale_dtype}" for f in FORMATS.values())
    )


def _check_rows(x: Any, fmt: Format) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a torch.Tensor")
    if x.dtype not in ROW_DTYPES or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}; expected contiguous rows "
            "[T, H] of bfloat16, float16 or float32"
        )
    fmt.layout(x.shape[1])  # says what hidden must be


def _as_tensor(value: Any, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        if value.dtype != torch.float32 or value.device != device:
            raise ValueError(
                f"global_scale is {value.dtype} on {value.device}; expected float32 on {device}"
            )
        return value
    check_global_scale("global_scale", value, device)
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((1,), float(value), dtype=torch.float32, device=device)


def _empty_scales(
    fmt: Format, tokens: int, hidden: int, scale_layout: str, device: torch.device
) -> torch.Tensor:
    """Scales to be written; what no row owns is 0."""
    width = fmt.num_scales(hidden)
    if scale_layout == "column":
        return empty_columns(fmt.scale_dtype, (tokens, width), device)
    if scale_layout == "swizzled":
        size = -(-tokens // 128) * -(-width // 4) * 512
        return torch.zeros(size, dtype=torch.uint8, device=device).view(fmt.scale_dtype)
    return torch.empty((tokens, width), dtype=fmt.scale_dtype, device=device)


def _arguments(
    fmt: Format, x: torch.Tensor, q: torch.Tensor, global_scale: torch.Tensor | None, stream: int
) -> Any:
    module = module_of(x)
    args = module.QuantizeArgs()
    args.quant = getattr(module.Quant, fmt.name)
    args.dtype = getattr(module.Dtype, str(x.dtype).removeprefix("torch."))
    args.num_rows, args.hidden = x.shape
    args.x = x.data_ptr()
    args.q = q.data_ptr()
    args.global_scale = 0 if global_scale is None else global_scale.data_ptr()
    args.stream = stream
    return args


def _set_strides(args: Any, scales: torch.Tensor) -> None:
    args.scales = scales.data_ptr()
    if scales.dim() == 1:
        args.set_scale_strides(0, 0, True)
        return
    size = scales.element_size()
    args.set_scale_strides(scales.stride(0) * size, scales.stride(1) * size, False)
