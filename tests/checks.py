"""Compares what epcomm returned with the oracle, every row and every bit."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import reference
from cases import Case, Format, Rows


@dataclass(frozen=True)
class Layout:
    name: str
    alignment: int = 1

    @property
    def id(self) -> str:
        return self.name + (f"_aligned_{self.alignment}" if self.alignment > 1 else "")

    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"layout": self.name}
        if self.alignment > 1:
            arguments["expert_alignment"] = self.alignment
        return arguments


@dataclass(frozen=True)
class Routing:
    """One routing of all ranks and what the oracle says of it."""

    owner: np.ndarray
    topk_idx: list[np.ndarray]
    layout: Layout
    max_tokens: int
    index_dtype: torch.dtype = torch.int64

    @property
    def num_ranks(self) -> int:
        return len(self.topk_idx)

    def received(self, rank: int, topk_weights: list[np.ndarray] | None) -> reference.Received:
        size = self.num_ranks * self.max_tokens
        if self.layout.name == "expert":
            size = self.layout.alignment
        layout = (self.layout.name,) if self.layout.name == "token" else (self.layout.name, size)
        return reference.dispatch(self.topk_idx, topk_weights, self.owner, rank, *layout)

    @functools.cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from every source to every rank and to every expert, each counted once."""
        ranks, experts = range(self.num_ranks), range(len(self.owner))
        named = [[{e for e in token if e >= 0} for token in idx.tolist()] for idx in self.topk_idx]
        to_rank = [
            [sum(any(self.owner[e] == r for e in token) for token in tokens) for r in ranks]
            for tokens in named
        ]
        to_expert = [[sum(e in token for token in tokens) for e in experts] for tokens in named]
        return np.array(to_rank, dtype=np.int32), np.array(to_expert, dtype=np.int32)


def routing_of(case: Case, num_ranks: int, layout: Layout) -> Routing:
    owner = reference.owners(case.experts(num_ranks), num_ranks, case.table(num_ranks))
    idx = [case.topk_idx(num_ranks, r) for r in range(num_ranks)]
    return Routing(owner, idx, layout, case.max_tokens, case.index_dtype)


def parts(rows: Rows) -> tuple[torch.Tensor, ...]:
    return rows if isinstance(rows, tuple) else (rows,)


def same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: {actual.dtype} {tuple(actual.shape)}, "
            f"expected {expected.dtype} {tuple(expected.shape)}"
        )
    if actual.numel() == 0:
        return
    ours, theirs = (t.cpu().contiguous().view(torch.uint8) for t in (actual, expected))
    if not torch.equal(ours, theirs):
        differ = (ours != theirs).reshape(len(ours), -1).any(dim=1).nonzero().flatten().tolist()
        at = differ[0]
        raise AssertionError(
            f"{what}: {len(differ)} of {len(ours)} rows differ, the first is {at}: "
            f"{actual[at].cpu()}, expected {expected[at]}"
        )


def equal(actual: torch.Tensor | None, expected: np.ndarray, what: str) -> None:
    """Same shape and ==, whatever the dtype; NaN is never equal."""
    if actual is None:
        raise AssertionError(f"{what} is None")
    ours = actual.float() if actual.dtype in (torch.bfloat16, torch.float16) else actual
    values = ours.cpu().numpy()
    if values.shape != expected.shape:
        raise AssertionError(f"{what}: shape {values.shape}, expected {expected.shape}")
    if not np.array_equal(values, expected):
        at = tuple(np.argwhere(values != expected)[0].tolist())
        count = int((values != expected).sum())
        raise AssertionError(
            f"{what}: {count} of {values.size} values are wrong, the first at {at}: "
            f"{values[at]}, expected {expected[at]}"
        )


def check_received(
    recv: Any,
    expected: reference.Received,
    rows: Sequence[Rows],
    routing: Routing,
    worst_case: bool = False,
) -> None:
    """recv against the oracle. rows[r]: what rank r dispatched."""
    n, layout = len(expected.source), routing.layout.name
    valid = torch.from_numpy(np.flatnonzero(expected.source >= 0))
    starts = np.cumsum([0] + [len(parts(r)[0]) for r in rows[:-1]])
    picked = torch.from_numpy((starts[expected.source] + expected.token)[valid.numpy()])

    got = parts(recv.x)
    if len(got) != len(parts(rows[0])):
        raise AssertionError(f"recv.x has {len(got)} parts, expected {len(parts(rows[0]))}")
    for i, name in enumerate(("recv.x", "recv.x scales")[: len(got)]):
        sent = torch.cat([parts(r)[i] for r in rows])
        ours = got[i].cpu()
        if layout == "padded":
            padded = (len(expected.tokens_per_expert), routing.num_ranks * routing.max_tokens)
            if ours.shape[:-1] != padded:
                raise AssertionError(f"{name}: shape {tuple(ours.shape)}, expected {padded} rows")
            ours = ours.reshape(-1, ours.shape[-1])
        elif worst_case:
            if len(ours) < n or (
                layout == "token" and len(ours) != routing.num_ranks * routing.max_tokens
            ):
                raise AssertionError(f"{name}: {len(ours)} rows are not the worst case")
        elif len(ours) != n:
            raise AssertionError(f"{name}: {len(ours)} rows, expected {n}")
        same_bits(ours[valid], sent[picked], name)

    _check_ids(recv, expected, routing)
    equal(recv.tokens_per_expert, expected.tokens_per_expert, "recv.tokens_per_expert")
    equal(recv.num_tokens, np.array([expected.num_tokens]), "recv.num_tokens")
    if expected.expert_offsets is not None:
        equal(recv.plan.expert_offsets, expected.expert_offsets, "plan.expert_offsets")
    _check_plan(recv.plan, expected, routing, worst_case)


def _check_ids(recv: Any, expected: reference.Received, routing: Routing) -> None:
    n = len(expected.source)
    if routing.layout.name == "padded":
        if recv.topk_idx is not None:
            raise AssertionError("recv.topk_idx of the padded layout is not None")
    else:
        if recv.topk_idx.dtype != routing.index_dtype:
            raise AssertionError(f"recv.topk_idx is {recv.topk_idx.dtype}")
        equal(recv.topk_idx[:n], expected.topk_idx, "recv.topk_idx")
        equal(recv.topk_idx[n:], np.full_like(recv.topk_idx[n:].cpu(), -1), "recv.topk_idx tail")
    if expected.topk_weights is None:
        if recv.topk_weights is not None:
            raise AssertionError("recv.topk_weights without weights is not None")
        return
    weights = recv.topk_weights
    if routing.layout.name == "padded":
        weights = weights.reshape(-1)
    equal(weights[:n], expected.topk_weights, "recv.topk_weights")
    equal(weights[n:], np.zeros_like(weights[n:].cpu()), "recv.topk_weights tail")


def _check_plan(
    plan: Any, expected: reference.Received, routing: Routing, worst_case: bool
) -> None:
    equal(plan.tokens_per_expert, expected.tokens_per_expert, "plan.tokens_per_expert")
    _check_counts(plan, routing)
    if plan.layout != routing.layout.name:
        raise AssertionError(f"plan.layout is {plan.layout!r}")
    if not worst_case and plan.num_recv_tokens != expected.num_tokens:
        raise AssertionError(f"plan.num_recv_tokens {plan.num_recv_tokens}: {expected.num_tokens}")


def _check_counts(plan: Any, routing: Routing) -> None:
    to_rank, to_expert = routing.counts
    equal(plan.rank_count, to_rank, "plan.rank_count")
    equal(plan.expert_count, to_expert, "plan.expert_count")


def fill(recv_x: torch.Tensor, values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Input of combine in the shape of recv.x: values in front, NaN where nobody may look."""
    hidden = values.shape[-1]
    shape = (*recv_x.shape[:-1], hidden)
    x = torch.full(shape, float("nan"), dtype=dtype)
    x.view(-1, hidden)[: len(values)] = torch.from_numpy(values).to(dtype)
    return x.to(recv_x.device)


def expert_outputs(
    case: Case, fmt: Format, received: Sequence[reference.Received], salt: int
) -> list[np.ndarray]:
    """What the experts of every rank answer, in the rank's layout; padding rows are NaN."""
    hidden = case.units * fmt.hidden_per_unit
    outputs = []
    for rank, r in enumerate(received):
        rng = case.rng(len(received), rank, 4, salt)
        values = case.values(rng, (len(r.source), hidden), fmt.buffer_dtype).float().numpy()
        values[r.source < 0] = np.nan
        outputs.append(values)
    return outputs


def exact_sum(
    outputs: Sequence[np.ndarray],
    received: Sequence[reference.Received],
    source: int,
    num_tokens: int,
    weighted: bool,
) -> np.ndarray:
    """The combined rows in float64, by another road than the oracle: over rows, not over tokens."""
    y = np.zeros((num_tokens, outputs[0].shape[-1]))
    for values, r in zip(outputs, received, strict=True):
        for n in np.flatnonzero(r.source == source):
            # Weights that were dispatched with the row say how it counts.
            weight = float(np.sum(r.topk_weights[n])) if weighted else 1.0
            y[r.token[n]] += weight * values[n].astype(np.float64)
    return y


def slot_values(received: reference.Received, rng: np.random.Generator) -> np.ndarray:
    """A float for each place where a weight arrived, of any size; NaN at all others."""
    values = rng.standard_normal(received.topk_idx.shape, dtype=np.float32)
    values[received.topk_idx < 0] = np.nan
    return values


def returned_values(
    values: Sequence[np.ndarray],
    received: Sequence[reference.Received],
    routing: Routing,
    source: int,
) -> np.ndarray:
    """What comes back to each slot of a rank's tokens; values[r]: of slot_values, at rank r."""
    idx = routing.topk_idx[source]
    expected = np.zeros(idx.shape, dtype=np.float32)
    for t, k in np.argwhere(idx >= 0):
        r, e = int(routing.owner[idx[t, k]]), int(idx[t, k])
        row = received[r].row[source, int(t), int(np.sum(routing.owner[:e] == r))]
        expected[t, k] = values[r][row, k] if routing.layout.name == "token" else values[r][row]
    return expected
