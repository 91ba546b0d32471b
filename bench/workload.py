"""The rows that are moved in one case, and what every rank must hold afterwards.

Row g (g counts tokens over all ranks) is a window of one random table that starts at element g, so
any row can be made anywhere, all rows differ, and a row that lands in the wrong place is seen.
Values are integers small enough that every sum in a combine is exact in every dtype: results are
compared with ==.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

import quantised
from routing import Routing

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
SCALE_BLOCK = 128  # elements that share one fp32 scale of an fp8 row
CHECK_ROWS = 2048  # rows compared at once; bounds the memory that a check takes


@dataclasses.dataclass(frozen=True)
class CaseConfig:
    """What does not change with the number of tokens."""

    rank: int
    hidden: int
    dtype: str
    quant: str | None
    layout: str
    expert_alignment: int
    device: torch.device
    seed: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where rows lie: row ids[i] times factors[i] at positions[i] of a flat tensor of rows."""

    positions: torch.Tensor
    ids: torch.Tensor
    factors: torch.Tensor


def source_factor(index: np.ndarray) -> np.ndarray:
    """What a combine input is multiplied by, per rank or expert, so that a swap of two is seen."""
    return 1 + index % 2


class Workload:
    """One rank's view of one case."""

    def __init__(self, config: CaseConfig, routing: Routing):
        if config.dtype == "fp8" and config.hidden % SCALE_BLOCK:
            raise ValueError(f"hidden {config.hidden}: fp8 needs a multiple of {SCALE_BLOCK}")
        if config.quant and config.hidden % quantised.MULTIPLE[config.quant]:
            multiple = quantised.MULTIPLE[config.quant]
            raise ValueError(
                f"hidden {config.hidden}: {config.quant} needs a multiple of {multiple}"
            )
        self.config = config
        self.routing = routing
        self.rank = config.rank
        self.tokens = routing.tokens
        self.dtype = DTYPES[config.dtype]
        # Results come back in 16 or 32 bits: fp8 is for the way out only.
        self.combine_dtype_name = "bf16" if config.dtype == "fp8" else config.dtype
        self.combine_dtype = DTYPES[self.combine_dtype_name]
        self.num_scales = config.hidden // SCALE_BLOCK if config.dtype == "fp8" else 0
        generator = torch.Generator().manual_seed(config.seed)
        length = routing.num_ranks * routing.tokens + config.hidden
        self._table = torch.randint(-3, 4, (length,), generator=generator).to(config.device)
        self._scales = 2.0 ** torch.randint(-4, 5, (length,), generator=generator).to(config.device)
        self._cast: dict[torch.dtype, torch.Tensor] = {}

        own = self._tensor(np.arange(self.tokens) + self.rank * self.tokens)
        self.own_ids = own
        self.x = self.rows(own, self.dtype)
        self.scales = self.scale_rows(own) if self.num_scales else None
        self.topk_idx = self._tensor(routing.topk_idx[self.rank])
        # Exact in fp32, different per slot; what a router would give is not needed to move rows.
        slots = torch.arange(routing.topk, device=config.device)
        self.topk_weights = (0.5**slots).float().expand(self.tokens, -1).contiguous()
        self.received = self._received(config.layout)

    # Traffic.

    def row_bytes(self, operation: str) -> int:
        """Payload of one row with its scales, without expert ids and weights. A pair is both."""
        dispatched = self.config.hidden * self.dtype.itemsize + 4 * self.num_scales
        if self.config.quant:
            dispatched = quantised.row_bytes(self.config.quant, self.config.hidden)
        combined = self.config.hidden * self.combine_dtype.itemsize
        return {"dispatch": dispatched, "combine": combined, "pair": dispatched + combined}[
            operation
        ]

    def rows_between(self, operation: str) -> np.ndarray:
        """int64 [sender, receiver]: rows that one call moves."""
        return self.routing.rows.T if operation == "combine" else self.routing.rows

    def link_bytes(self, operation: str) -> float:
        """Bytes that leave a rank for another one, averaged over ranks."""
        rows = self.routing.rows
        return (rows.sum() - np.trace(rows)) / self.routing.num_ranks * self.row_bytes(operation)

    def logical_bytes(self, operation: str) -> float:
        """Bytes that a rank hands over, rows for itself included, averaged over ranks."""
        return self.routing.rows.sum() / self.routing.num_ranks * self.row_bytes(operation)

    # Rows.

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.config.device)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ids, [len(ids), hidden] of dtype."""
        if dtype not in self._cast:
            # float8 is gathered as bytes: torch indexes few of its tensors.
            cast = self._table.to(torch.float32).to(dtype)
            self._cast[dtype] = cast.view(torch.uint8) if dtype.itemsize == 1 else cast
        windows = self._windows(self._cast[dtype], self.config.hidden)
        return windows[ids].view(dtype)

    def scale_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Scales of rows ids, fp32 [len(ids), hidden / SCALE_BLOCK]."""
        return self._windows(self._scales, self.num_scales)[ids]

    def _windows(self, table: torch.Tensor, width: int) -> torch.Tensor:
        num_ids = self.routing.num_ranks * self.tokens
        return table.as_strided((num_ids, width), (1, 1))

    # What must come out.

    def packed(self) -> Placement:
        """This rank's rows by destination rank, then token: what a plain all-to-all is given."""
        destination, token = np.nonzero(self.routing.reaches[self.rank].T)
        return self._placement(
            np.arange(len(token)), token + self.rank * self.tokens, source_factor(destination)
        )

    def _received(self, layout: str) -> Placement:
        return self.received_by_token() if layout == "token" else self._received_by_expert(layout)

    def received_by_token(self) -> Placement:
        """Rows that this rank receives, by source rank, then token."""
        source, token = np.nonzero(self.routing.reaches[:, :, self.rank])
        factors = np.full(len(token), source_factor(np.array(self.rank)))
        return self._placement(np.arange(len(token)), token + source * self.tokens, factors)

    def _received_by_expert(self, layout: str) -> Placement:
        positions, ids, factors = [], [], []
        start = 0
        for index, expert in enumerate(self.routing.local_experts(self.rank)):
            group = np.flatnonzero((self.routing.topk_idx == expert).any(axis=2).reshape(-1))
            if layout == "padded":
                start = index * self.routing.num_ranks * self.tokens
            positions.append(np.arange(len(group)) + start)
            ids.append(group)
            factors.append(np.full(len(group), source_factor(expert)))
            alignment = self.config.expert_alignment
            start += -(-len(group) // alignment) * alignment
        empty = [np.zeros(0, dtype=np.int64)]
        return self._placement(
            *(np.concatenate(empty + part) for part in (positions, ids, factors))
        )

    def _placement(self, positions: np.ndarray, ids: np.ndarray, factors: np.ndarray) -> Placement:
        return Placement(self._tensor(positions), self._tensor(ids), self._tensor(factors))

    def tokens_per_expert(self) -> list[int]:
        """Distinct tokens that each local expert receives."""
        experts = self.routing.local_experts(self.rank)
        return [int((self.routing.topk_idx == e).any(axis=2).sum()) for e in experts]

    def expert_output(self, shape: torch.Size) -> torch.Tensor:
        """Input of a combine in the shape of the received rows: NaN where no row lies."""
        out = torch.full(tuple(shape), float("nan"), device=self.config.device).to(
            self.combine_dtype
        )
        placement = self.received
        rows = self.rows(placement.ids, self.combine_dtype) * placement.factors[:, None]
        out.view(-1, shape[-1])[placement.positions] = rows.to(self.combine_dtype)
        return out

    def combined(self) -> torch.Tensor:
        """What a combine of expert_output() must give: each row times the sum of its factors."""
        if self.config.layout == "token":
            factors = source_factor(np.arange(self.routing.num_ranks))
            total = (self.routing.reaches[self.rank] * factors).sum(axis=1)
        else:
            chosen = np.zeros((self.tokens, self.routing.num_experts), dtype=np.int64)
            token, slot = np.nonzero(self.routing.topk_idx[self.rank] >= 0)
            chosen[token, self.routing.topk_idx[self.rank, token, slot]] = 1
            total = chosen @ source_factor(np.arange(self.routing.num_experts))
        rows = self.rows(self.own_ids, self.combine_dtype) * self._tensor(total)[:, None]
        return rows.to(self.combine_dtype)

    # Checks. Each returns the number of wrong elements on this rank.

    def wrong_received(self, x: torch.Tensor, scales: torch.Tensor | None, at: Placement) -> int:
        """Compares received rows (any leading shape) with the rows that must lie at a placement."""
        wrong = self._wrong_at(x, at, lambda ids: self.rows(ids, self.dtype))
        if self.num_scales:
            if scales is None:
                return wrong + len(at.ids) * self.num_scales
            wrong += self._wrong_at(scales, at, self.scale_rows)
        return wrong

    def wrong_quantised(
        self,
        q: torch.Tensor,
        scales: torch.Tensor,
        global_scale: torch.Tensor | None,
        at: Placement,
    ) -> int:
        """As wrong_received, of rows that were quantised on the way (config.quant)."""
        q, scales = q.reshape(-1, q.shape[-1]), scales.reshape(-1, scales.shape[-1])
        if len(at.ids) and int(at.positions.max()) >= len(q):
            return len(at.ids) * self.config.hidden
        wrong = 0
        for start in range(0, len(at.ids), CHECK_ROWS):
            part = slice(start, start + CHECK_ROWS)
            where = at.positions[part]
            picked = _picked(q, where), _picked(scales, where)
            globals_ = None if global_scale is None else global_scale.reshape(-1)[where]
            values = quantised.dequantised(*picked, globals_).round()
            wrong += self.wrong_elements(values, self.rows(at.ids[part], torch.float32))
        return wrong

    def wrong_elements(self, actual: torch.Tensor, expected: torch.Tensor) -> int:
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return max(expected.numel(), 1)
        return int((actual != expected).sum())

    def _wrong_at(self, actual: torch.Tensor, at: Placement, expected) -> int:
        flat = actual.reshape(-1, actual.shape[-1])
        if len(at.ids) and int(at.positions.max()) >= len(flat):
            return len(at.ids) * flat.shape[1]
        wrong = 0
        for start in range(0, len(at.ids), CHECK_ROWS):
            part = slice(start, start + CHECK_ROWS)
            want = expected(at.ids[part])
            if want.dtype.itemsize == 1:
                got = flat.view(torch.uint8)[at.positions[part]]
                wrong += self.wrong_elements(got, want.view(torch.uint8))
            else:
                wrong += self.wrong_elements(flat[at.positions[part]], want)
        return wrong


def _picked(rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """rows[where]; float8 as bytes, since torch indexes few of its tensors."""
    if rows.dtype.itemsize > 1:
        return rows[where]
    return rows.view(torch.uint8)[where].view(rows.dtype)
