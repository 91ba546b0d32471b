"""One case on one rank: every call that the API offers, each checked against the oracle."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

import checks
import quant_reference
import reference
from cases import Case, Format, Rows
from checks import Layout

REPLAYS = 3


@lru_cache(maxsize=256)
def expectations(case: Case, num_ranks: int, layout: Layout) -> tuple[Any, Any, Any]:
    """Routing, weights of all ranks or None, what every rank receives; shared by all formats."""
    routing = checks.routing_of(case, num_ranks, layout)
    weights = [case.topk_weights(num_ranks, r) for r in range(num_ranks)] if case.weights else None
    return routing, weights, [routing.received(r, weights) for r in range(num_ranks)]


def buffer_arguments(case: Case, num_ranks: int, fmt: Format) -> dict[str, Any]:
    return {
        "num_experts": case.experts(num_ranks),
        "hidden": case.units * fmt.hidden_per_unit,
        "topk": case.buffer_topk,
        "max_tokens": case.max_tokens,
        "dtype": fmt.buffer_dtype,
        "expert_to_rank": case.table(num_ranks),
    }


@lru_cache(maxsize=2048)
def quantised(case: Case, fmt: Format, num_ranks: int, rank: int, salt: int) -> Rows:
    """What the rows of a rank become: q, scales and, for nvfp4, the global scale of each."""
    assert fmt.quant is not None
    x = checks.parts(case.rows(fmt, num_ranks, rank, salt))[0].float().numpy()
    scale = given_scale(fmt, salt)
    if scale is None:
        scale = float(quant_reference.global_scale(x))
    q, scales = quant_reference.quantise(x, fmt.quant, scale)
    if fmt.quant == "nvfp4":
        globals_ = torch.full((len(x), 1), scale, dtype=torch.float32)
        return torch.from_numpy(q), torch.from_numpy(scales).view(torch.float8_e4m3fn), globals_
    entries = scales.reshape(len(x), scales.shape[1] // 4, 4).copy()
    entries = entries.view(np.float32 if fmt.quant == "fp8" else np.int32)[..., 0]
    return torch.from_numpy(q).view(torch.float8_e4m3fn), torch.from_numpy(entries)


def given_scale(fmt: Format, salt: int) -> float | None:
    """Global scales are given in every second call, and else left to be computed."""
    return 0.5 + salt if fmt.quant == "nvfp4" and salt % 2 == 1 else None


def through_fp8(partial: np.ndarray) -> np.ndarray:
    """A partial row as a combine with quant="fp8" receives it."""
    row = quant_reference.quantise(partial[None], "fp8")
    return quant_reference.dequantise(*row, "fp8")[0]


@dataclass
class Trial:
    buf: Any
    case: Case
    layout: Layout
    fmt: Format
    device: str = "cpu"
    # Ranks that a transport adds up before their sums leave the node; None: it adds up none.
    ranks_per_node: int | None = None

    def __post_init__(self) -> None:
        self.rank, self.num_ranks = self.buf.rank, self.buf.num_ranks
        self.routing, self.weights, self.received = expectations(
            self.case, self.num_ranks, self.layout
        )
        idx = torch.from_numpy(self.routing.topk_idx[self.rank])
        self.topk_idx = idx.to(self.case.index_dtype).to(self.device)
        self.topk_weights = None
        if self.weights is not None:
            self.topk_weights = torch.from_numpy(self.weights[self.rank]).to(self.device)
        self.combine_quants = [kind.name for kind in self.buf.caps.combine_quants]
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def rows_of(self, rank: int, salt: int) -> Rows:
        """What a rank dispatches."""
        return self.case.rows(self.fmt, self.num_ranks, rank, salt)

    def arriving(self, rank: int, salt: int) -> Rows:
        """What the others receive of it."""
        if self.fmt.quant is None:
            return self.rows_of(rank, salt)
        return quantised(self.case, self.fmt, self.num_ranks, rank, salt)

    def dispatch(self, salt: int, plan: Any = None, host_sync: bool = True) -> Any:
        """Dispatches the rows of this salt, checks what arrives, and keeps it."""
        mine = tuple(part.to(self.device) for part in checks.parts(self.rows_of(self.rank, salt)))
        arguments: dict[str, Any] = {"plan": plan}
        if plan is None:
            arguments = {"topk_idx": self.topk_idx, **self.layout.arguments()}
        recv = self.buf.dispatch(
            mine if len(mine) > 1 else mine[0],
            topk_weights=self.topk_weights,
            host_sync=host_sync,
            quant=self.fmt.quant,
            quant_scale=given_scale(self.fmt, salt),
            **arguments,
        )
        rows = [self.arriving(r, salt) for r in range(self.num_ranks)]
        seen = recv
        if recv.global_scale is not None:
            seen = replace(recv, x=(*recv.x, recv.global_scale.unsqueeze(-1)))
        checks.check_received(
            seen, self.received[self.rank], rows, self.routing, worst_case=not host_sync
        )
        for tensor in (*checks.parts(seen.x), recv.topk_idx, recv.topk_weights):
            if tensor is not None:
                self.held.append((tensor, tensor.clone()))
        return recv

    def combine(
        self,
        recv: Any,
        salt: int,
        weighted: bool = False,
        bias: bool = False,
        out: bool = False,
        quant: str | None = None,
    ) -> torch.Tensor:
        """Combines the expert outputs of this salt and checks every row of y."""
        dtype = self.fmt.buffer_dtype
        outputs = checks.expert_outputs(self.case, self.fmt, self.received, salt)
        x = checks.fill(checks.parts(recv.x)[0], outputs[self.rank], dtype)
        idx = self.routing.topk_idx[self.rank]
        shape = (len(idx), outputs[0].shape[-1])
        added = self.case.values(self.case.rng(self.num_ranks, self.rank, 5, salt), shape, dtype)
        y_out = torch.full(shape, float("nan"), dtype=dtype, device=self.device)
        y = self.buf.combine(
            x,
            recv.plan,
            topk_weights=self.topk_weights if weighted else None,
            bias=added.to(self.device) if bias else None,
            out=y_out if out else None,
            quant=quant,
        )
        if out and y.data_ptr() != y_out.data_ptr():
            raise AssertionError("combine did not return out=")
        if y.dtype != dtype:
            raise AssertionError(f"combine gave {y.dtype}")
        weights = self.weights[self.rank] if weighted else None
        b = added.float().numpy() if bias else None
        checks.equal(y, self.expected_y(outputs, weights, b, quant), "y")
        return y

    def combine_topk_weights(self, recv: Any, salt: int) -> None:
        """Returns a float from every place of a slot and checks each; NaN where none is."""
        values = [
            checks.slot_values(r, self.case.rng(self.num_ranks, rank, 6, salt))
            for rank, r in enumerate(self.received)
        ]
        shape = recv.x[0].shape[:-1] if isinstance(recv.x, tuple) else recv.x.shape[:-1]
        if self.layout.name == "token":
            shape = (*shape, self.routing.topk_idx[self.rank].shape[1])
        mine = torch.full(shape, float("nan"))
        mine.view(-1)[: values[self.rank].size] = torch.from_numpy(values[self.rank].ravel())
        if self.layout.name == "token":
            self.combine_every_slot(recv)
        got = self.buf.combine_topk_weights(mine.to(self.device), recv.plan)
        checks.equal(
            got,
            checks.returned_values(values, self.received, self.routing, self.rank),
            "values of slots",
        )

    def combine_every_slot(self, recv: Any) -> None:
        """Sums over all rows of a token: row n of rank r gives r + 1 + k to slot k."""
        idx, owner = self.routing.topk_idx[self.rank], self.routing.owner
        slots = np.arange(idx.shape[1])
        mine = torch.full((recv.topk_idx.shape[0], len(slots)), float("nan"))
        mine[: len(self.received[self.rank].source)] = torch.from_numpy(self.rank + 1.0 + slots)
        got = self.buf.combine_topk_weights(mine.to(self.device), recv.plan, every_slot=True)
        ranks = [{int(owner[e]) for e in token if e >= 0} for token in idx.tolist()]
        expected = [sum(r + 1.0 + slots for r in token) + 0.0 * slots for token in ranks]
        checks.equal(got, np.array(expected).reshape(idx.shape), "values of every slot")

    def expected_y(
        self,
        outputs: list[np.ndarray],
        weights: np.ndarray | None,
        bias: np.ndarray | None,
        quant: str | None = None,
    ) -> np.ndarray:
        """The oracle's y, itself held against sums in float64."""
        cross = None if quant is None else through_fp8
        dtype, idx = self.fmt.buffer_dtype, self.routing.topk_idx[self.rank]
        round_ = reference.ROUND[str(dtype).removeprefix("torch.")]
        nodes = self.ranks_per_node
        node = None if nodes is None else np.arange(self.num_ranks) // nodes
        expected = reference.combine(
            outputs,
            self.received,
            idx,
            self.routing.owner,
            self.rank,
            round_,
            weights,
            bias,
            cross,
            node,
        )
        if quant is not None:  # not exact; tests/test_quant_dispatch.py bounds the error
            return expected
        exact = checks.exact_sum(outputs, self.received, self.rank, len(idx), weights is not None)
        exact += 0.0 if bias is None else bias
        if self.case.payload == "random":
            eps = torch.finfo(dtype).eps
            np.testing.assert_allclose(expected, exact, rtol=4 * eps, atol=32 * eps)
        elif not np.array_equal(expected, exact):
            raise AssertionError("the oracle is not exact on this case")
        return expected

    def check_held(self) -> None:
        """Nothing that was received earlier has changed since."""
        for tensor, copy in self.held:
            checks.same_bits(tensor, copy.cpu(), "a tensor that was received earlier")

    def run(self) -> None:
        recv = again = self.dispatch(0)
        for replay in range(REPLAYS):
            again = self.dispatch(1 + replay, plan=recv.plan)
        self.combine(recv, 10)
        self.combine_topk_weights(recv, 15)
        self.combine(again, 11, bias=True, out=True)
        self.combine_topk_weights(again, 16)
        if self.topk_weights is not None:
            self.combine(recv, 12, weighted=True, out=True)
            first = self.combine(again, 13, weighted=True, bias=True, out=True)
            second = self.combine(recv, 13, weighted=True, bias=True)
            checks.same_bits(second, first.cpu(), "y of the same inputs")
        if "fp8" in self.combine_quants and self.buf.hidden % 128 == 0:
            self.combine(recv, 15, quant="fp8", out=True)
            weighted = self.topk_weights is not None
            first = self.combine(again, 16, weighted=weighted, bias=True, quant="fp8")
            second = self.combine(recv, 16, weighted=weighted, bias=True, quant="fp8")
            checks.same_bits(second, first.cpu(), "y of the same inputs, quantised")
        late = self.dispatch(20, host_sync=False)
        late = self.dispatch(21, plan=late.plan, host_sync=False)
        self.combine(late, 14, weighted=self.topk_weights is not None, out=True)
        self.combine_topk_weights(late, 17)
        self.check_held()
