"""Every transport against the oracle: transport x ranks x layout x dtype x case, one body.

A new transport joins by adding one entry to TRANSPORTS. EPCOMM_TEST_RANKS=5,6,7,8 runs with so many
ranks instead of the usual numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any
from unittest import SkipTest

import pytest

import launcher
from cases import CASES, FORMATS, Case, Format
from checks import Layout
from epcomm import _core, nvshmem
from launcher import TIMEOUT_S, WANTED_RANKS
from trial import Trial, buffer_arguments


@dataclass(frozen=True)
class Transport:
    name: str
    device: str = "cpu"
    pool: str = ""  # of launcher.pool; "" = the device
    marks: tuple[pytest.MarkDecorator, ...] = ()
    # Where making a Buffer takes long, one Buffer serves all layouts, in one test.
    slow_to_make: bool = False
    # (ranks, ranks_per_node) that it runs with, each with three pairs of layout and format that
    # differ from one to the next; () = RANKS, with all pairs.
    nodes: tuple[tuple[int, int], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def buffer_arguments(self, ranks_per_node: int | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"transport": self.name, "timeout": TIMEOUT_S}
        if self.options:
            arguments["transport_options"] = dict(self.options)
        return arguments | {"ranks_per_node": ranks_per_node}


TRANSPORTS = (
    Transport("cpu"),
    Transport(
        "hierarchical",
        nodes=((4, 2), (6, 3), (6, 2), (4, 1), (5, 2), (3, 3)),
        options=(("chunk_tokens", 3),),
    ),
    Transport("nccl", "cuda", marks=(pytest.mark.gpu,), slow_to_make=True),
    # Where GPUs have peer access the one above does without NCCL: batches are small.
    Transport(
        "nccl",
        "cuda",
        marks=(pytest.mark.gpu,),
        slow_to_make=True,
        options=(("algorithm", "small"),),
    ),
    Transport("nvlink", "cuda", marks=(pytest.mark.gpu,), slow_to_make=True),
    Transport(
        "nvlink",
        "cuda",
        marks=(pytest.mark.gpu,),
        slow_to_make=True,
        options=(("path", "large"),),
    ),
    Transport(
        "rdma",
        "cuda",
        "rdma",
        marks=(pytest.mark.gpu, pytest.mark.rdma),
        slow_to_make=True,
    ),
    Transport(
        "hierarchical",
        "cuda",
        "rdma",
        marks=(pytest.mark.gpu, pytest.mark.rdma),
        slow_to_make=True,
        nodes=((4, 2), (2, 1), (4, 1), (3, 2), (4, 3), (2, 2)),
        options=(("chunk_tokens", 3),),
    ),
)
RANKS = (1, 2, 3, 4, 7)
QUANT_RANKS = (1, 2, 4, 8)  # the rows are wide, and quantisation knows nothing of ranks
# (ranks, ranks_per_node) of a host with eight GPUs, with EPCOMM_TEST_RANKS.
MORE_NODES = ((5, 2), (6, 3), (7, 4), (8, 4), (8, 2))
LAYOUTS = (
    Layout("token"),
    Layout("expert"),
    Layout("expert", 8),
    Layout("expert", 128),
    Layout("padded"),
)
# Alignments that routing alone knows of: with two formats each, not with half of them.
FEW_FORMATS = (Layout("expert"), Layout("expert", 128))


def _formats(
    transport: Transport, num_ranks: int, layouts: Sequence[Layout], i: int, j: int
) -> list[Any]:
    """Of rows that a test moves. i, j: of its number of ranks and its layouts in their lists."""
    formats = list(FORMATS.values())
    if transport.nodes:
        formats = [formats[(i + j) % len(formats)]]
    formats = [one for one in formats if one.quant is None or num_ranks in QUANT_RANKS]
    if transport.nodes or len(layouts) > 1 or WANTED_RANKS:
        return formats
    if layouts[0] in FEW_FORMATS:
        return [formats[(i + j + skip) % len(formats)] for skip in (0, len(formats) // 2)]
    # Half of them: a format and a layout meet with (1, 4, 7) ranks or with (2, 3).
    return formats[((i + 1) // 2 + j // 2) % 2 :: 2]


def _grid() -> Iterator[Any]:
    for transport in TRANSPORTS:
        sizes: Sequence[tuple[int, int | None]] = [(n, None) for n in WANTED_RANKS or RANKS]
        if transport.nodes:
            known = dict.fromkeys((*transport.nodes, *MORE_NODES)) if WANTED_RANKS else ()
            sizes = [size for size in known if size[0] in WANTED_RANKS] or transport.nodes
        for i, (num_ranks, ranks_per_node) in enumerate(sizes):
            options = dict(transport.options)
            name = f"{transport.name}{options.get('path', options.get('algorithm', ''))}"
            name += "-gpu" if transport.nodes and transport.device == "cuda" else ""
            name += f"-{num_ranks}"
            name += "" if ranks_per_node is None else f"by{ranks_per_node}"
            groups = [LAYOUTS] if transport.slow_to_make else [(one,) for one in LAYOUTS]
            for j, layouts in enumerate(groups):
                if transport.nodes and (j - i) % len(groups) > 2:
                    continue
                for fmt in _formats(transport, num_ranks, layouts, i, j):
                    yield pytest.param(
                        transport,
                        num_ranks,
                        ranks_per_node,
                        layouts,
                        fmt,
                        id=f"{name}-{'-'.join(one.id for one in layouts)}-{fmt.id}",
                        marks=transport.marks,
                    )


def fault_of(buf: Any) -> str:
    """What a Buffer on a GPU has noticed meanwhile: results are wrong, too, where a wait was given
    up."""
    try:
        buf.check_faults()
    except Exception as fault:
        return f" ({fault!r})"
    return ""


def run_cases(
    group: Any,
    transport: Transport,
    ranks_per_node: int | None,
    layouts: Sequence[Layout],
    fmt: Format,
) -> int:
    """All cases on this rank; cases that agree on the Buffer's arguments share one."""
    import epcomm

    def key(case: Case) -> str:
        return repr(buffer_arguments(case, group.size(), fmt))

    done = 0
    for _, members in groupby(sorted(CASES.values(), key=key), key=key):
        cases = list(members)
        arguments = buffer_arguments(cases[0], group.size(), fmt)
        arguments |= transport.buffer_arguments(ranks_per_node)
        with epcomm.Buffer(group, **arguments) as buf:
            if buf.transport != transport.name:
                raise AssertionError(f"asked for transport {transport}, got {buf.transport}")
            grouped = ranks_per_node if buf.caps.forwards else None
            able = [one for one in layouts if getattr(buf.caps, f"{one.name}_layout")]
            if not able:
                raise SkipTest(f"{transport.name} has none of the layouts {layouts}")
            for case, layout in product(cases, able):
                try:
                    Trial(buf, case, layout, fmt, transport.device, grouped).run()
                except Exception as error:
                    text = f"case {case.id}, {layout.id}: {error}{fault_of(buf)}"
                    raise AssertionError(text) from error
            done += len(cases)
    return done


@pytest.mark.parametrize(
    ("transport", "num_ranks", "ranks_per_node", "layouts", "fmt"), list(_grid())
)
def test_conformance(
    transport: Transport,
    num_ranks: int,
    ranks_per_node: int | None,
    layouts: Sequence[Layout],
    fmt: Format,
) -> None:
    if transport.pool == "rdma" and not nvshmem.built_transports():
        pytest.skip(f"no NVSHMEM in this build: {_core.nvshmem_status}")
    pool = launcher.pool(transport.pool or transport.device)
    if num_ranks > pool.size:
        pytest.skip(f"needs {num_ranks} ranks, this machine has {pool.size}")
    done = pool.run(num_ranks, run_cases, transport, ranks_per_node, layouts, fmt)
    assert done == [len(CASES)] * num_ranks
