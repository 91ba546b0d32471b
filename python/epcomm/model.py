"""How long dispatch and combine take on nodes x GPUs x NIC speed: an alpha-beta model per link.

    python -m epcomm.model --nodes 2,8 --gpus 8 --nic 50 --nvlink 160 --tokens 4096

Nothing is measured here. Rows per link are counted as `Buffer.link_counters` counts them, in
expectation over uniform routing; an algorithm keeps both links busy at once, and each link takes
alpha + bytes / beta. docs/model.md says where each alpha and beta comes from, and how far off the
model is where there is something to compare it with.

This module needs the standard library only, and `import epcomm` does not import it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

ALGORITHMS = ("per_expert", "flat", "two_stage", "nccl")


@dataclass(frozen=True)
class Batch:
    """What every rank dispatches, and among whom. Experts are split evenly over the ranks.

    Attributes:
        nodes, gpus: nodes, and ranks (GPUs) per node.
        tokens: of each rank.
        hidden: elements of a token row.
        experts, topk: experts in all, distinct experts per token.
        max_nodes: nodes that the experts of one token lie on at most (node-limited routing);
            0 = no limit.
    """

    nodes: int
    gpus: int
    tokens: int = 4096
    hidden: int = 7168
    experts: int = 256
    topk: int = 8
    max_nodes: int = 0

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "tokens", "hidden", "experts", "topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.experts % self.ranks:
            raise ValueError(
                f"experts is {self.experts}; expected a multiple of nodes * gpus = {self.ranks}"
            )
        if not 0 <= self.max_nodes <= self.nodes:
            raise ValueError(f"max_nodes is {self.max_nodes}; expected 0 to nodes = {self.nodes}")
        if self.topk > self.eligible:
            raise ValueError(
                f"topk is {self.topk}; expected at most the {self.eligible} experts that a token "
                "can choose from"
            )

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def eligible(self) -> int:
        """Experts on the nodes that one token may use."""
        return self.experts // self.nodes * (self.max_nodes or self.nodes)

    def reached(self, groups: int) -> float:
        """Expected number of groups that a token reaches, of `groups` equal groups of ranks."""
        groups = groups * (self.max_nodes or self.nodes) // self.nodes
        others = self.eligible - self.eligible // groups
        return groups * (1 - comb(others, self.topk) / comb(self.eligible, self.topk))


@dataclass(frozen=True)
class Rows:
    """Expected rows that one rank sends for each of its tokens; for combine, that it receives."""

    local: float
    node: float
    rail: float


def rows_per_token(batch: Batch, algorithm: str) -> Rows:
    """Rows by link. The receivers of a token are spread evenly over ranks, whichever it is from.

    "per_expert": one row per (token, expert). "flat" and "nccl": one per (token, rank).
    "two_stage": one per (token, remote node) on the rail, one per (token, rank) inside the nodes.
    """
    ranks, gpus, nodes = batch.ranks, batch.gpus, batch.nodes
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}; expected one of {', '.join(ALGORITHMS)}")
    if algorithm == "two_stage":
        # Every rank forwards as much as it sends, and one of `gpus` forwarded rows to itself.
        inside = batch.reached(ranks)
        rail = batch.reached(nodes) * (nodes - 1) / nodes
        return Rows(inside / gpus, inside * (gpus - 1) / gpus, rail)
    rows = batch.topk if algorithm == "per_expert" else batch.reached(ranks)
    return Rows(rows / ranks, rows * (gpus - 1) / ranks, rows * (ranks - gpus) / ranks)


@dataclass(frozen=True)
class Link:
    """alpha_us: time of an operation that moves nothing; share: part of the line rate in use."""

    alpha_us: float
    share: float

    def time_us(self, rows: float, row_bytes: float, line_gbps: float) -> float:
        """0 without rows; GB/s are 10^9 bytes per second."""
        return self.alpha_us + rows * row_bytes / (self.share * line_gbps * 1e3) if rows else 0.0


# Node link, rail. docs/model.md: fitted to the published tables (per_expert, two_stage), to our own
# run (nccl, node), or assumed (flat is per_expert with fewer rows; nccl's rail).
LINKS: dict[str, tuple[Link, Link]] = {
    "per_expert": (Link(35.0, 1.0), Link(23.0, 0.84)),
    "flat": (Link(35.0, 1.0), Link(23.0, 0.84)),
    "two_stage": (Link(35.0, 0.82), Link(58.0, 0.89)),
    "nccl": (Link(15.0, 0.76), Link(15.0, 0.89)),
}


@dataclass(frozen=True)
class Estimate:
    """One operation of one algorithm: bytes that a rank moves over each link, and the time."""

    node_bytes: float
    rail_bytes: float
    time_us: float
    bound: str  # the link that takes longest: "node", "rail" or "none"


def estimate(
    batch: Batch, algorithm: str, row_bytes: float, *, nic_gbps: float, nvlink_gbps: float
) -> Estimate:
    """Time of a dispatch, or of the combine that answers it, with rows of row_bytes.

    Args:
        nic_gbps, nvlink_gbps: line rates per GPU and direction, in 10^9 bytes per second.
    """
    for name, value in (("row_bytes", row_bytes), ("nic", nic_gbps), ("nvlink", nvlink_gbps)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; expected more than 0")
    rows = rows_per_token(batch, algorithm)
    node, rail = LINKS[algorithm]
    if algorithm == "two_stage" and rows.rail:
        node = Link(rail.alpha_us, node.share)  # both stages start up, whichever link is slower
    times = {
        "node": node.time_us(rows.node * batch.tokens, row_bytes, nvlink_gbps),
        "rail": rail.time_us(rows.rail * batch.tokens, row_bytes, nic_gbps),
        "none": 0.0,
    }
    bound = max(times, key=lambda link: times[link])
    scale = batch.tokens * row_bytes
    return Estimate(rows.node * scale, rows.rail * scale, times[bound], bound)


def row_bytes_of(hidden: int, dtype: str) -> float:
    """Bytes of a row: bf16, or fp8 with one fp32 scale per 128 elements."""
    if dtype not in ("bf16", "fp8"):
        raise ValueError(f"dtype is {dtype!r}; expected bf16 or fp8")
    return hidden * (2 if dtype == "bf16" else 1 + 4 / 128)


def table(
    batches: Sequence[Batch], nics: Sequence[float], nvlink: float, dispatch_dtype: str
) -> list[str]:
    """Lines of a table: one for each batch, NIC and algorithm. Combine moves bf16."""
    lines = [
        f"{'nodes x GPUs':>12} {'NIC GB/s':>9} {'algorithm':>11} {'rows/token: node':>17} "
        f"{'rail':>6} {'dispatch us':>12} {'bound':>6} {'combine us':>11} {'bound':>6}"
    ]
    for batch, nic in itertools.product(batches, nics):
        for algorithm in ALGORITHMS:
            rows = rows_per_token(batch, algorithm)
            out, back = (
                estimate(
                    batch,
                    algorithm,
                    row_bytes_of(batch.hidden, dtype),
                    nic_gbps=nic,
                    nvlink_gbps=nvlink,
                )
                for dtype in (dispatch_dtype, "bf16")
            )
            lines.append(
                f"{f'{batch.nodes} x {batch.gpus}':>12} {nic:>9g} {algorithm:>11} "
                f"{rows.node:>17.2f} {rows.rail:>6.2f} {out.time_us:>12.0f} {out.bound:>6} "
                f"{back.time_us:>11.0f} {back.bound:>6}"
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table for the command line; 2 and a message for a wrong argument."""

    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m epcomm.model",
        description="Modelled times of dispatch and combine; docs/model.md says from what. "
        "Lists are separated by commas.",
    )
    parser.add_argument("--nodes", type=integers, default=[1, 2, 4, 8], help="nodes")
    parser.add_argument("--gpus", type=integers, default=[8], help="GPUs per node")
    parser.add_argument("--nic", type=numbers, default=[50.0], help="GB/s per GPU and direction")
    parser.add_argument("--nvlink", type=float, default=160.0, help="GB/s per GPU and direction")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--max-nodes", type=int, default=0, help="node-limited routing; 0 = none")
    parser.add_argument("--dispatch", choices=("fp8", "bf16"), default="fp8", help="dtype of rows")
    given = parser.parse_args(arguments)
    try:
        batches = [
            Batch(
                nodes,
                gpus,
                given.tokens,
                given.hidden,
                given.experts,
                given.topk,
                min(given.max_nodes, nodes),
            )
            for nodes, gpus in itertools.product(given.nodes, given.gpus)
        ]
        lines = table(batches, given.nic, given.nvlink, given.dispatch)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
