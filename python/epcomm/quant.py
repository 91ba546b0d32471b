"""Quantisation of token rows."""

from __future__ import annotations

import torch

BLOCK = 128
"""Channels that share one fp8 scale."""

_FP8_MAX = 448.0  # largest finite e4m3 (OCP 8-bit floating point specification, v1.0)


def quantize_fp8(x: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises rows to e4m3 with one fp32 scale per 128 channels.

    scale = amax / 448, and 1 where a block is all zero; with `ue8m0` rounded up to a power of two.
    A block with a NaN or an infinity gets a NaN or infinite scale, so that it stays detectable.

    Args:
        x: [num_tokens, hidden] bf16, fp16 or fp32; hidden a multiple of 128.
        ue8m0: power-of-two scales (still fp32).

    Returns:
        (q, scales): float8_e4m3fn [num_tokens, hidden], float32 [num_tokens, hidden / 128].

    Raises:
        ValueError: if hidden is not a multiple of 128.
    """
    if x.dim() != 2 or x.shape[1] % BLOCK != 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; fp8 quantisation needs [num_tokens, hidden] with "
            f"hidden a multiple of {BLOCK}"
        )
    blocks = x.float().view(x.shape[0], x.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=2)
    scales = amax / _FP8_MAX
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if ue8m0:
        mantissa, exponent = torch.frexp(scales)
        up = exponent - (mantissa == 0.5).to(exponent.dtype)
        scales = torch.where(
            torch.isfinite(scales), torch.ldexp(torch.ones_like(scales), up), scales
        )
    q = (blocks / scales.unsqueeze(2)).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return q.view(x.shape), scales


def dequantize_fp8(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inverse of `quantize_fp8`: fp32 [..., hidden] from q and scales [..., hidden / 128]."""
    blocks = q.float().view(*scales.shape, BLOCK)
    return (blocks * scales.unsqueeze(-1)).view(q.shape)
