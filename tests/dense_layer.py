"""Oracle of the differentiable layer: the same experts on all tokens of all ranks, in one process.

No communication and nothing of epcomm: loops over tokens and slots, in float64. Everything is a
small integer, so float32 sums of another order are equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cases import Case

HIDDEN = 4
# How the weights enter: beside the rows, for the experts to apply; at the tokens' rank; not at all.
MODES = ("delivered", "combined", "none")


def expert(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Not linear, so that its gradient needs the right x."""
    return (x @ matrix).square()


def _integers(rng: np.random.Generator, shape: tuple[int, ...], most: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(-most, most + 1, shape).astype(np.float32))


@dataclass
class Tensors:
    """Leaves of one rank's tokens."""

    x: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor
    grad_y: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.weights, self.bias]


def tensors(
    case: Case, num_ranks: int, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> Tensors:
    """Inputs of a rank, the same wherever they are made."""
    rng = case.rng(num_ranks, rank, 7)
    rows = (case.num_tokens(rank), HIDDEN)
    x, bias, grad_y = (_integers(rng, rows, 2).to(device, dtype) for _ in range(3))
    weights = _integers(rng, (rows[0], case.topk(num_ranks)), 3).to(device, dtype)
    return Tensors(x.requires_grad_(), weights.requires_grad_(), bias.requires_grad_(), grad_y)


def matrices(case: Case, num_ranks: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_experts, HIDDEN, HIDDEN]; with layout "token" that of rank r is number r."""
    count = max(case.experts(num_ranks), num_ranks)
    return _integers(case.rng(num_ranks, 99, 8), (count, HIDDEN, HIDDEN), 1).to(dtype)


def forward(
    topk_idx: np.ndarray,
    t: Tensors,
    params: torch.Tensor,
    owner: np.ndarray,
    mode: str,
    by_rank: bool,
) -> torch.Tensor:
    """y of one rank. by_rank: the experts of a rank are one function, as combine sees them."""
    rows = []
    for token, experts in enumerate(topk_idx.tolist()):
        y, seen = t.bias[token], set()
        for k, e in enumerate(experts):
            if e < 0:
                continue
            which = int(owner[e]) if by_rank else e
            if mode == "none" and which in seen:
                continue
            seen.add(which)
            out = expert(t.x[token], params[which])
            y = y + (out if mode == "none" else t.weights[token, k] * out)
        rows.append(y)
    return torch.stack(rows) if rows else t.bias * 1.0


def gradients(
    case: Case, idx: Sequence[np.ndarray], owner: np.ndarray, mode: str, by_rank: bool
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]], torch.Tensor]:
    """By rank: y and the gradients of x, weights and bias; then that of all matrices."""
    num_ranks = len(idx)
    params = matrices(case, num_ranks, torch.float64).requires_grad_()
    inputs = [tensors(case, num_ranks, r, torch.float64) for r in range(num_ranks)]
    ys = [forward(idx[r], inputs[r], params, owner, mode, by_rank) for r in range(num_ranks)]
    loss = sum((y * t.grad_y).sum() for y, t in zip(ys, inputs, strict=True))
    leaves = [leaf for t in inputs for leaf in t.leaves()]
    grads = torch.autograd.grad(loss, [*leaves, params], allow_unused=True)
    filled = [
        torch.zeros_like(leaf) if g is None else g
        for leaf, g in zip([*leaves, params], grads, strict=True)
    ]
    return (
        [y.detach() for y in ys],
        [filled[3 * r : 3 * r + 3] for r in range(num_ranks)],
        filled[-1],
    )
