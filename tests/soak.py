"""Many random calls, each checked exactly and without a wait of the host.

Every rank derives the routing and the rows of all ranks from the number of the call, on its own
device, so nothing is asked of the library under test and thousands of calls cost one wait:

- A row is a window of one random table. Its start is known for each (call, rank, token), and no two
  rows of a call start at the same place, so a row that is lost, stale or misplaced is seen.
- Values are small integers and weights powers of two: every sum is exact and compared with ==.
- What was checked is overwritten with NaN, so that the next call must write all of it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SCALES = 4  # fp32, beside each row of fp8
STARTS = 65521  # prime: starts of rows; a table has `hidden` more elements
HOLES = 10  # one slot in this many names no expert
CALLS_PER_TABLE = 500  # then the rows are of another table
WORDS = (-7046029254386353131, 0x1CE4E5B9BF58476D, 0x133111EB94D049BB)  # odd, of 64 bits


def mixed(key: torch.Tensor, call: int) -> torch.Tensor:
    """Pseudo-random non-negative int64 numbers of integers and the number of the call."""
    bits = (key + call * 0x632BE5AB) * WORDS[0]
    for shift, word in zip((30, 27), WORDS[1:], strict=True):
        bits = (bits ^ (bits >> shift)) * word
    return (bits ^ (bits >> 31)) & 0x7FFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Shape:
    """Sizes of a Buffer."""

    num_ranks: int
    max_tokens: int
    hidden: int = 256
    num_experts: int = 16
    topk: int = 4


@dataclass(frozen=True)
class Batch:
    """What this rank dispatches in one call."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor

    @property
    def rows(self) -> Any:
        return self.x if self.scales is None else (self.x, self.scales)


@dataclass(frozen=True)
class Placement:
    """Where rows lie in one rank's tensor, all on the device."""

    ids: torch.Tensor  # of each row: the token among those of all ranks, -1 = none
    groups: torch.Tensor  # of each row: its local expert
    slots: torch.Tensor  # of each row: local experts (layout "token": topk of them)
    weights: torch.Tensor  # likewise
    counts: torch.Tensor  # of each group: its rows, without padding
    num_rows: torch.Tensor  # of all groups, with padding


class Checker:
    """One rank's knowledge of all calls, and the count of what was wrong in them."""

    def __init__(self, rank: int, shape: Shape, device: str = "cuda"):
        self.rank, self.shape, self.device = rank, shape, device
        tokens = shape.num_ranks * shape.max_tokens
        if tokens > STARTS:
            raise ValueError(f"{tokens} tokens of all ranks; expected at most {STARTS}")
        per_rank = -(-shape.num_experts // shape.num_ranks)
        self.first_expert = min(rank * per_rank, shape.num_experts)
        self.num_local = min(per_rank, shape.num_experts - self.first_expert)

        def numbers(count: int) -> torch.Tensor:
            return torch.arange(count, device=device)

        self.rows = numbers(tokens)
        self.token = self.rows % shape.max_tokens
        self.owner = numbers(shape.num_experts) // per_rank
        self.choices = numbers(tokens * shape.num_experts).view(tokens, -1)
        self.slots = -1 - numbers(tokens * shape.topk).view(tokens, -1)
        self._wrong = torch.zeros(CALLS_PER_TABLE, dtype=torch.int64, device=device)
        self._number = 0
        self._tables: dict[Any, torch.Tensor] = {}
        self._epoch = -1

    # What is sent.

    def call(self, number: int, tokens: list[int], fp8: bool = False) -> "Call":
        """Call `number`, in which rank r dispatches tokens[r] rows."""
        self._number = max(self._number, number)
        return Call(self, number, tokens, fp8)

    def tokens(self, rng: random.Random) -> list[int]:
        """Batch sizes of all ranks: 0, the most and anything between."""
        most = self.shape.max_tokens
        return [
            rng.choice((rng.randint(0, most), rng.randint(0, min(16, most)), most))
            for _ in range(self.shape.num_ranks)
        ]

    def starts(self, number: int) -> torch.Tensor:
        """Where the row of each token of all ranks starts in the table."""
        step = 1 + number * 7919 % (STARTS - 1)
        return (self.rows * step + number * 104729) % STARTS

    def windows(
        self, number: int, starts: torch.Tensor, dtype: torch.dtype, width: int | None = None
    ) -> torch.Tensor:
        """[len(starts), width or hidden] of dtype, from the table of call `number`."""
        epoch = number // CALLS_PER_TABLE
        if epoch != self._epoch:
            self._epoch = epoch
            self._tables.clear()
        if dtype not in self._tables:
            # On the CPU, so that all ranks get the same numbers whatever their GPUs are.
            generator = torch.Generator().manual_seed(epoch)
            values = torch.randint(-4, 5, (STARTS + self.shape.hidden,), generator=generator)
            table = values.float().to(dtype).to(self.device)
            # Not all functions of torch know float8.
            self._tables[dtype] = table.view(torch.uint8) if dtype.itemsize == 1 else table
        windows = self._tables[dtype].as_strided((STARTS, width or self.shape.hidden), (1, 1))
        return windows[starts].view(dtype)

    # What has come.

    def count(self, number: int, wrong: torch.Tensor | int) -> None:
        """Adds to what was wrong in a call: a number, or a mask."""
        self._wrong[number % CALLS_PER_TABLE] += wrong if isinstance(wrong, int) else wrong.sum()

    def wrong(self) -> dict[int, int]:
        """Wrong elements since the last time, of up to CALLS_PER_TABLE calls; waits for the device.

        By the number of the call.
        """
        counts = self._wrong.tolist()
        self._wrong.zero_()
        first = self._number - CALLS_PER_TABLE + 1
        return {
            first + (i - first) % CALLS_PER_TABLE: count for i, count in enumerate(counts) if count
        }


class Call:
    """The routing of one call on all ranks, and what must come of it here."""

    def __init__(self, checker: Checker, number: int, tokens: list[int], fp8: bool):
        self._checker, self.number, self.tokens, self.fp8 = checker, number, tokens, fp8
        shape = checker.shape
        idx = mixed(checker.choices, number).topk(shape.topk, dim=1).indices
        drawn = mixed(checker.slots, number)
        idx = torch.where(drawn % HOLES == 0, -1, idx)
        sizes = torch.tensor(tokens, device=checker.device).repeat_interleave(
            shape.max_tokens, output_size=len(idx)
        )
        self.topk_idx = torch.where((checker.token < sizes)[:, None], idx, -1)
        self.weights = 2.0 ** ((drawn >> 20) % 4 - 2).float()
        self._starts = checker.starts(number)
        self._known: dict[Any, Any] = {}  # what was worked out for an earlier check
        self._mine = slice(
            checker.rank * shape.max_tokens, checker.rank * shape.max_tokens + tokens[checker.rank]
        )

    def batch(self, dtype: torch.dtype = torch.bfloat16) -> Batch:
        checker, starts = self._checker, self._starts[self._mine]
        return Batch(
            checker.windows(self.number, starts, torch.float8_e4m3fn if self.fp8 else dtype),
            checker.windows(self.number, starts, torch.float32, SCALES) if self.fp8 else None,
            self.topk_idx[self._mine].contiguous(),
            self.weights[self._mine].contiguous(),
        )

    def check_received(self, recv: Any, layout: str, alignment: int = 1) -> None:
        """Rows, scales, ids, weights and counts that a dispatch gave."""
        checker = self._checker
        x, scales = recv.x if isinstance(recv.x, tuple) else (recv.x, None)
        flat = x.view(-1, x.shape[-1])
        at = self.placement(layout, alignment, len(flat))
        self._check_rows(flat, at)
        if (scales is not None) != self.fp8:
            checker.count(self.number, 1)
        if scales is not None:
            self._check_rows(scales.view(-1, scales.shape[-1]), at)
        # Rows that should be there and are beyond the end of the tensor.
        checker.count(self.number, at.counts.sum() != (at.ids >= 0).sum())
        self._check_slots(recv, at, layout)
        checker.count(self.number, recv.tokens_per_expert != self.members("expert").sum(1))
        checker.count(self.number, recv.num_tokens != self.members("token").sum())

    def outputs(self, layout: str, alignment: int, out: torch.Tensor) -> torch.Tensor:
        """Fills out, of the shape of received rows, with what the experts make of them.

        Each row times 1 or 2, by the expert or, in layout "token", the rank; NaN between rows.
        """
        checker, flat = self._checker, out.view(-1, out.shape[-1])
        at = self.placement(layout, alignment, len(flat))
        rows = checker.windows(self.number, self._starts[at.ids.clamp(min=0)], out.dtype)
        index = at.groups + checker.first_expert if layout != "token" else checker.rank
        rows = rows * (1 + index % 2)[:, None] if layout != "token" else rows * (1 + index % 2)
        flat.copy_(torch.where((at.ids >= 0)[:, None], rows, float("nan")))
        return out

    def check_combined(self, y: torch.Tensor, layout: str, weighted: bool) -> None:
        """y against the sum of outputs()."""
        checker, idx = self._checker, self.topk_idx[self._mine]
        makers = checker.owner[idx] if layout == "token" else idx
        factors = (1.0 + makers % 2) * (idx >= 0)
        if weighted:
            factors = factors * self.weights[self._mine]
        elif layout == "token":  # one row per rank, however many of its experts have the token
            ranks = torch.arange(checker.shape.num_ranks, device=checker.device)
            there = ((makers[:, :, None] == ranks) & (idx >= 0)[:, :, None]).any(1)
            factors = there * (1.0 + ranks % 2)
        x = checker.windows(self.number, self._starts[self._mine], y.dtype)
        checker.count(self.number, y.float() != x.float() * factors.sum(1, keepdim=True))

    # Where rows lie.

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What make() gave when it was first asked for by this key."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def members(self, layout: str) -> torch.Tensor:
        """bool [groups, tokens of all ranks]: groups are local experts, one in layout "token"."""
        return self._once(("members", layout), lambda: self._members(layout))

    def _members(self, layout: str) -> torch.Tensor:
        checker = self._checker
        if layout == "token":
            here = (checker.owner[self.topk_idx] == checker.rank) & (self.topk_idx >= 0)
            return here.any(1)[None]
        experts = checker.first_expert + torch.arange(checker.num_local, device=checker.device)
        return (self.topk_idx[None] == experts[:, None, None]).any(2)

    def placement(self, layout: str, alignment: int, rows: int) -> Placement:
        """Where what is dispatched here must lie in a tensor of so many rows."""
        key = ("placement", layout, alignment, rows)
        return self._once(key, lambda: self._placement(layout, alignment, rows))

    def _placement(self, layout: str, alignment: int, rows: int) -> Placement:
        checker, members = self._checker, self.members(layout)
        counts = members.sum(1)
        group = torch.arange(len(counts), device=checker.device)
        filled = (counts + alignment - 1) // alignment * alignment
        first = filled.cumsum(0) - filled
        if layout == "padded":
            first = group * checker.shape.num_ranks * checker.shape.max_tokens
        # A place beyond the end takes what has no row.
        at = torch.where(members, first[:, None] + members.cumsum(1) - 1, rows).clamp(max=rows)
        ids = torch.full((rows + 1,), -1, device=checker.device)
        groups = torch.zeros(rows + 1, dtype=torch.int64, device=checker.device)
        ids.scatter_(0, at.flatten(), checker.rows.repeat(len(counts)))
        groups.scatter_(0, at.flatten(), group[:, None].expand_as(at).flatten())
        ids, groups = ids[:rows], groups[:rows]
        slots, weights = self._slots(layout, ids, groups)
        return Placement(ids, groups, slots, weights, counts, filled.sum())

    # Parts of check_received.

    def _check_rows(self, got: torch.Tensor, at: Placement) -> None:
        checker, starts = self._checker, self._starts[at.ids.clamp(min=0)]
        want = checker.windows(self.number, starts, got.dtype, got.shape[1])
        if got.dtype.itemsize == 1:
            got, want = got.view(torch.uint8), want.view(torch.uint8)
        checker.count(self.number, (got != want) & (at.ids >= 0)[:, None])

    def _check_slots(self, recv: Any, at: Placement, layout: str) -> None:
        there = at.ids >= 0
        if layout == "token":
            there = there[:, None]
            self._checker.count(self.number, (recv.topk_idx != at.slots) & there)
        elif layout == "expert":  # padding of groups says -1
            rows = torch.arange(len(there), device=self._checker.device)
            self._checker.count(self.number, (recv.topk_idx != at.slots) & (rows < at.num_rows))
        weights = recv.topk_weights.view(at.weights.shape)
        self._checker.count(self.number, (weights != at.weights) & there)

    def _slots(
        self, layout: str, ids: torch.Tensor, groups: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights that come with rows; experts of layout "padded" are not given."""
        checker, there, ids = self._checker, ids >= 0, ids.clamp(min=0)
        idx, weights = self.topk_idx[ids], self.weights[ids]
        if layout == "token":
            here = (checker.owner[idx] == checker.rank) & (idx >= 0)
            slots = torch.where(here, idx - checker.first_expert, -1)
            return slots, torch.where(here, weights, 0.0)
        carries = idx == (groups + checker.first_expert)[:, None]
        return torch.where(there, groups, -1), torch.where(carries, weights, 0.0).sum(1)


def overwrite(recv: Any) -> None:
    """Makes everything that was received wrong, so that a later call cannot be right by it."""
    for tensor in recv.x if isinstance(recv.x, tuple) else (recv.x,):
        tensor.view(torch.uint8).fill_(0xFF)  # NaN in every type of row and scale
    for tensor in (recv.topk_idx, recv.topk_weights):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0x7F)
