"""Errors of the quantised formats and of a quantised combine on normal inputs, as the tables of
docs/quantisation.md.

    torchrun --nproc-per-node 4 bench/quant_error.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import epcomm
from epcomm import quant

ROWS, HIDDEN, EXPERTS, TOPK = 1024, 7168, 64, 8


def errors(exact: torch.Tensor, back: torch.Tensor) -> str:
    """Largest and mean relative error over elements of at least 1/16 of the standard deviation, and
    the root mean square of the error over that of the exact rows, as columns of a table.
    """
    exact, error = exact.double(), (back.double() - exact.double()).abs()
    large = exact.abs() >= exact.std() / 16
    relative = error[large] / exact.abs()[large]
    rms = (error.square().mean() / exact.square().mean()).sqrt()
    return f"{relative.max():.2%} | {relative.mean():.2%} | {rms:.2%}"


def formats() -> None:
    x = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(0))
    for name in quant.FORMATS:
        back = quant.dequantize(*quant.quantize(x, name))
        print(f"| `{name}` | {errors(x, back)} |")


def combine(buf: epcomm.Buffer) -> None:
    """Expert outputs are standard normal numbers rounded to bf16; the exact sum is in fp32."""
    rng = torch.Generator().manual_seed(buf.rank)
    tokens = buf.max_tokens
    weights, idx = torch.rand(tokens, EXPERTS, generator=rng).softmax(dim=1).topk(TOPK)
    weights /= weights.sum(dim=1, keepdim=True)
    x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    plan = buf.dispatch(x, idx, weights, layout="expert").plan
    out = torch.randn(plan.num_recv_rows, HIDDEN, generator=rng).bfloat16()
    exact = buf.combine(out.float(), plan, topk_weights=weights)
    for name in (None, "fp8"):
        y = buf.combine(out, plan, topk_weights=weights, quant=name)
        if buf.rank == 0:
            print(f"| `combine(quant={name!r})`, bf16 | {errors(exact, y)} |")


def main() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        print("| | max relative | mean relative | rms error / rms |\n|---|--:|--:|--:|")
        formats()
    with epcomm.Buffer(
        num_experts=EXPERTS,
        hidden=HIDDEN,
        topk=TOPK,
        max_tokens=ROWS // dist.get_world_size(),
        dtype=torch.float32,
        transport="cpu",
    ) as buf:
        combine(buf)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
