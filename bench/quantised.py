"""Quantised rows as docs/quantisation.md defines them: their bytes, and what they stand for.

Written without epcomm, which it checks. Rows of small integers survive every format: what comes
back is off by at most a sixteenth of itself, so that rounding to integers gives what was sent.
"""

from __future__ import annotations

import torch

QUANTS = ("fp8", "fp8_ue8m0", "nvfp4")
FP8_GROUP = 128  # elements that share a scale
NVFP4_GROUP = 16
# Elements that hidden must be a multiple of.
MULTIPLE = {"fp8": FP8_GROUP, "fp8_ue8m0": FP8_GROUP, "nvfp4": 32}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def row_bytes(quant: str, hidden: int) -> int:
    """Elements and scales of one row."""
    if quant == "nvfp4":
        return hidden // 2 + hidden // NVFP4_GROUP
    if quant == "fp8":
        return hidden + 4 * (hidden // FP8_GROUP)
    return hidden + 4 * -(-hidden // (4 * FP8_GROUP))


def dequantised(
    q: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor | None
) -> torch.Tensor:
    """fp32 [rows, hidden] of q and scales [rows, any], and for nvfp4 one global scale per row.

    The types say which format it is.
    """
    if q.dtype == torch.uint8:
        assert global_scale is not None
        codes = torch.stack([q & 15, q >> 4], dim=-1).flatten(1).long()
        magnitudes = torch.tensor(E2M1, device=q.device)[codes & 7]
        values = torch.where(codes >= 8, -magnitudes, magnitudes)
        return values * _spread(scales.float() * global_scale[:, None], NVFP4_GROUP)
    if scales.dtype == torch.int32:  # four exponents of powers of two
        exponents = scales.contiguous().view(torch.uint8)[:, : q.shape[1] // FP8_GROUP]
        scales = (exponents.int() << 23).view(torch.float32)
    return q.float() * _spread(scales, FP8_GROUP)


def _spread(scales: torch.Tensor, group: int) -> torch.Tensor:
    return scales.repeat_interleave(group, dim=1)
