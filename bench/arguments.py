"""The command line of all2all.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from adapters import ADAPTERS
from quantised import QUANTS
from routing import RoutingSpec
from timing import CADENCES
from workload import DTYPES

LAUNCHES = ("eager", "graph")
OPERATIONS = ("dispatch", "combine", "pair")
# What is known beforehand: docs/benchmarking.md says what each is.
MODES = ("fresh", "no-sync", "replay", "elsewhere", "graph", "graph-replay", "packed")


def integers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of at least 1")
    return values


def transports(text: str) -> list[str]:
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different names, as nvlink,rdma")
    return names


def names_of(known: Sequence[str]):
    """A parser of lists of these names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times MoE dispatch and combine. Start it with torchrun, one process per rank."
    )
    add = parser.add_argument
    add(
        "--transport",
        type=transports,
        default=os.environ.get("EPCOMM_TRANSPORT", "auto"),
        help="of epcomm; several, as nvlink,rdma, are compared in one run",
    )
    add("--ranks-per-node", type=int, help="of the transport hierarchical; others take none")
    add("--tokens", type=integers, help="per rank: 1,8,64,512 (and 4096 on a GPU)")
    add("--hidden", type=int, default=7168, help="elements of a token row")
    add("--topk", type=int, help="experts per token: 8, or what the routing file has")
    add("--experts", type=int, default=256)
    add(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="fp8 takes (q, scales) pairs; combine is bf16",
    )
    add("--quant", choices=QUANTS, help="what dispatch makes of the rows on the way")
    add("--layout", choices=("token", "expert", "padded"), default="token")
    add("--expert-alignment", type=int, default=1, help="rows, for --layout expert")
    add(
        "--like-deep-ep",
        action="store_true",
        help="epcomm gets what DeepEP V1 would: combines from memory of torch's allocator; with "
        "--layout padded topk_weights go to combine, not to dispatch",
    )
    add("--num-sms", type=integers, help="most SMs a call may use; several values are a sweep")
    add("--routing", default="uniform", help="uniform, zipf:S, one-expert, or a file of expert ids")
    known = tuple(ADAPTERS)
    add("--adapter", type=names_of(known), default=["epcomm", "torch"], help=",".join(known))
    add(
        "--launch",
        type=names_of(LAUNCHES),
        default=["eager"],
        help="eager, graph (captured into CUDA graphs) or both",
    )
    add("--graph", dest="launch", action="store_const", const=["graph"], help="--launch graph")
    add("--operations", type=names_of(OPERATIONS), default=list(OPERATIONS), help="to time")
    add("--modes", type=names_of(MODES), default=list(MODES), help="to time")
    add("--cadence", type=names_of(CADENCES), default=list(CADENCES), help="to time")
    add("--overlap", action="store_true", help="time each call of epcomm beside a grouped GEMM")
    add("--overlap-width", type=int, help="columns of its weights: 2048 (32 on the CPU)")
    add(
        "--transport-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="of epcomm's transport_options; may be repeated",
    )
    add("--commit", help="what the rows are of; default: asks git")
    add("--json", metavar="FILE", help="write the rows as JSON lines")
    add("--csv", metavar="FILE", help="write the rows as CSV")
    add("--plot", metavar="FILE.png", help="draw time and bandwidth; needs matplotlib")
    add("--iters", type=int, default=0, help="timed iterations; 0: as many as fit the time budget")
    add("--warmup", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=30.0, help="seconds that a wait for a peer may take")
    args = parser.parse_args(argv)
    if args.transport_option and len(args.transport) > 1:
        parser.error("--transport-option with several transports: expected one --transport")
    if args.ranks_per_node is not None and "hierarchical" not in args.transport:
        parser.error("--ranks-per-node: expected --transport hierarchical, alone or among others")
    args.routing = _or_usage_error(parser, lambda: RoutingSpec.parse(args.routing))
    if args.topk is None:
        args.topk = 8 if args.routing.table is None else args.routing.table.shape[1]
    if not 1 <= args.topk <= args.experts:
        parser.error(f"--topk {args.topk}: expected 1 to {args.experts} (--experts)")
    if args.quant and args.dtype == "fp8":
        parser.error("--quant with --dtype fp8: expected rows that are not quantised yet")
    if args.plot:
        _or_usage_error(parser, lambda: __import__("matplotlib"))
    return args


def _or_usage_error(parser: argparse.ArgumentParser, make):
    try:
        return make()
    except (ValueError, ImportError) as error:
        parser.error(str(error))
