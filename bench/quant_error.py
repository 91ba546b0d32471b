"""Errors of the quantised formats on normal inputs, as the table of docs/quantisation.md.

python bench/quant_error.py
"""

from __future__ import annotations

import torch

from epcomm import quant

ROWS, HIDDEN = 1024, 7168


def errors(x: torch.Tensor, back: torch.Tensor) -> tuple[float, float, float]:
    """Largest and mean relative error over elements of at least 1/16 of the standard deviation, and
    the root mean square of the error over that of x.
    """
    exact, error = x.double(), (back.double() - x.double()).abs()
    large = exact.abs() >= exact.std() / 16
    relative = error[large] / exact.abs()[large]
    rms = float((error.square().mean() / exact.square().mean()).sqrt())
    return float(relative.max()), float(relative.mean()), rms


def main() -> None:
    x = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(0))
    print("| format | max relative | mean relative | rms error / rms |")
    print("|---|--:|--:|--:|")
    for name in quant.FORMATS:
        back = quant.dequantize(*quant.quantize(x, name))
        print("| `{}` | {:.2%} | {:.2%} | {:.2%} |".format(name, *errors(x, back)))


if __name__ == "__main__":
    main()
