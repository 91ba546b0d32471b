"""Inputs of the conformance suite: what each rank dispatches, seeded and the same on every rank.

Values are small integers and weights are powers of two, so that every sum is exact in bf16 and
results are compared with ==; the "random" case is the exception.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Format:
    """One kind of token row. Widths are given in units of 16 bytes, which every row is made of."""

    id: str
    row_dtype: torch.dtype
    buffer_dtype: torch.dtype  # also the dtype of combine
    hidden_per_unit: int
    scale_dtype: torch.dtype | None = None
    hidden_per_scale: int = 1
    quant: str | None = None  # quantised on the way; a unit is then what makes 128 or 32 elements


FORMATS = {
    f.id: f
    for f in (
        Format("bf16", torch.bfloat16, torch.bfloat16, 8),
        Format("fp16", torch.float16, torch.float16, 8),
        Format("fp32", torch.float32, torch.float32, 4),
        Format("fp8", torch.float8_e4m3fn, torch.bfloat16, 16, torch.float32, 128),
        Format("packed", torch.uint8, torch.bfloat16, 32, torch.uint8, 16),
        Format("quant_fp8", torch.bfloat16, torch.bfloat16, 128, quant="fp8"),
        Format("quant_fp8_ue8m0", torch.float32, torch.float32, 128, quant="fp8_ue8m0"),
        Format("quant_nvfp4", torch.float16, torch.float16, 32, quant="nvfp4"),
    )
}


def _uniform(
    rng: np.random.Generator, rank: int, shape: tuple[int, int], experts: int
) -> np.ndarray:
    """Distinct experts per token; -1 when there are fewer experts than slots."""
    num_tokens, topk = shape
    idx = np.full(shape, -1)
    for t in range(num_tokens):
        chosen = rng.permutation(experts)[:topk]
        idx[t, : len(chosen)] = chosen
    return idx


def _holes(rng, rank, shape, experts):
    idx = _uniform(rng, rank, shape, experts)
    idx[rng.random(shape) < 0.5] = -1
    return idx


def _no_expert(rng, rank, shape, experts):
    return np.full(shape, -1)


def _even_ranks_send_nothing(rng, rank, shape, experts):
    return (
        _no_expert(rng, rank, shape, experts)
        if rank % 2 == 0
        else _holes(rng, rank, shape, experts)
    )


def _last_expert_only(rng, rank, shape, experts):
    idx = np.full(shape, -1)
    idx[:, shape[1] // 2] = experts - 1
    return idx


def _first_experts(rng, rank, shape, experts):
    return np.tile(np.arange(shape[1]) % min(2, experts), (shape[0], 1))


def _any_experts(rng, rank, shape, experts):
    return rng.integers(-1, experts, shape)


def _duplicates(rng, rank, shape, experts):
    """Few experts, of all ranks; every third token names one expert in all its slots."""
    idx = rng.choice(np.arange(-1, experts, 2), shape)
    idx[::3] = idx[::3, :1]
    return idx


def _one_per_rank(rng, rank, shape, experts):
    """With as many slots as ranks and experts split evenly, every token goes to every rank."""
    return rng.permuted(np.tile(np.arange(shape[1]) * (experts // shape[1]), (shape[0], 1)), axis=1)


def _no_expert_on_rank_0(ranks: int) -> list[int]:
    return [ranks - 1 - e % max(1, ranks - 1) for e in range(3 * ranks)]


@dataclass(frozen=True)
class Case:
    """One routing. tokens: per rank, repeated; experts, topk, table: functions of num_ranks."""

    id: str
    tokens: tuple[int, ...] = (6,)
    routing: Callable[..., np.ndarray] = _uniform
    experts: Callable[[int], int] = lambda ranks: 3 * ranks
    topk: Callable[[int], int] = lambda ranks: 4
    buffer_topk: int = 8
    max_tokens: int = 24
    units: int = 3
    table: Callable[[int], list[int] | None] = lambda ranks: None
    index_dtype: torch.dtype = torch.int64
    weights: bool = True
    payload: str = "exact"  # or "bits": any bit pattern; "random": real numbers

    def rng(self, ranks: int, *salt: int) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(self.id.encode()), ranks, *salt])

    def num_tokens(self, rank: int) -> int:
        return self.tokens[rank % len(self.tokens)]

    def topk_idx(self, ranks: int, rank: int) -> np.ndarray:
        shape = (self.num_tokens(rank), self.topk(ranks))
        return self.routing(self.rng(ranks, rank, 1), rank, shape, self.experts(ranks))

    def topk_weights(self, ranks: int, rank: int, salt: int = 0) -> np.ndarray | None:
        rng = self.rng(ranks, rank, 2, salt)
        shape = (self.num_tokens(rank), self.topk(ranks))
        if not self.weights:
            return None
        if self.payload == "random":
            return rng.random(shape, dtype=np.float32)
        return (0.25 * 2 ** rng.integers(0, 3, shape)).astype(np.float32)

    def rows(self, fmt: Format, ranks: int, rank: int, salt: int = 0) -> Rows:
        """Rows to dispatch; another salt gives other values of the same shape."""
        rng, num_tokens = self.rng(ranks, rank, 3, salt), self.num_tokens(rank)
        hidden = self.units * fmt.hidden_per_unit
        width = hidden if fmt.quant else self.units * 16 // fmt.row_dtype.itemsize
        if fmt.scale_dtype is None and self.payload != "bits":
            return self.values(rng, (num_tokens, hidden), fmt.row_dtype, 100)
        x = _any_bits(rng, (num_tokens, width), fmt.row_dtype)
        if fmt.scale_dtype is None:
            return x
        num_scales = -(-hidden // fmt.hidden_per_scale)
        return x, _any_bits(rng, (num_tokens, num_scales), fmt.scale_dtype)

    def values(
        self, rng: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype, most: int = 4
    ) -> torch.Tensor:
        """Integers up to most in size, or real numbers in the random case."""
        if self.payload == "random":
            return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype)
        return torch.from_numpy(rng.integers(-most, most + 1, shape).astype(np.float32)).to(dtype)


def _any_bits(rng: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype)
    raw = rng.integers(0, 256, (shape[0], shape[1] * dtype.itemsize), dtype=np.uint8)
    x.view(torch.uint8).copy_(torch.from_numpy(raw))
    return x


_CASES = (
    Case("uniform"),
    Case("empty_last_rank", tokens=(5, 5, 5, 5, 5, 5, 0)[::-1]),
    Case("every_second_rank_empty", tokens=(7, 0)),
    Case("all_ranks_empty", tokens=(0,)),
    Case("one_token", tokens=(1, 0, 0, 0, 0, 0, 0)),
    Case("one_token_each", tokens=(1,)),
    Case("uneven_tokens", tokens=(1, 17, 4, 0, 23, 2, 9)),
    Case("full_window", tokens=(24,), routing=_one_per_rank, topk=lambda ranks: ranks),
    Case("one_expert", tokens=(24, 13), routing=_last_expert_only),
    Case("first_experts", tokens=(8, 11), routing=_first_experts),
    Case("holes", tokens=(9,), routing=_holes),
    Case("no_expert", routing=_no_expert),
    Case("some_ranks_send_nothing", routing=_even_ranks_send_nothing),
    Case("duplicates", tokens=(9, 4), routing=_duplicates),
    Case("topk_1", topk=lambda ranks: 1, buffer_topk=1),
    Case("topk_8", topk=lambda ranks: 8, experts=lambda ranks: 8 + ranks),
    Case("row_of_16_bytes", units=1),
    Case("odd_row", units=37),
    Case("short_tail", experts=lambda ranks: 2 * ranks + 1),
    Case("fewer_experts_than_ranks", experts=lambda ranks: max(1, ranks - 2)),
    Case("one_expert_in_all", experts=lambda ranks: 1, tokens=(3, 5)),
    Case("table", table=lambda ranks: [(7 * e + e // 3) % ranks for e in range(3 * ranks)]),
    Case("table_with_idle_rank", table=_no_expert_on_rank_0),
    Case("int32", index_dtype=torch.int32, tokens=(5, 8)),
    Case("without_weights", weights=False, routing=_holes, tokens=(7, 3)),
    Case("any_bits", payload="bits"),
    Case("random", payload="random", tokens=(16, 11), units=8, routing=_any_experts),
)  # fmt: skip
CASES = {case.id: case for case in _CASES}
