"""Every transport against the oracle: transport x ranks x layout x dtype x case, one body.

A new transport joins by adding one entry to TRANSPORTS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any
from unittest import SkipTest

import pytest

import launcher
from cases import CASES, FORMATS, Case, Format
from checks import Layout
from trial import Trial, buffer_arguments


@dataclass(frozen=True)
class Transport:
    name: str
    device: str = "cpu"
    max_ranks: int = 7
    marks: tuple[pytest.MarkDecorator, ...] = ()
    # Where making a Buffer takes long, one Buffer serves all layouts, in one test.
    slow_to_make: bool = False


TRANSPORTS = (
    Transport("cpu"),
    Transport("nccl", "cuda", marks=(pytest.mark.gpu,), slow_to_make=True),
    Transport("nvlink", "cuda", marks=(pytest.mark.gpu,), slow_to_make=True),
)
RANKS = (1, 2, 3, 4, 7)
QUANT_RANKS = (1, 2, 4)  # the rows are wide, and quantisation knows nothing of ranks
LAYOUTS = (
    Layout("token"),
    Layout("expert"),
    Layout("expert", 8),
    Layout("expert", 128),
    Layout("padded"),
)
TIMEOUT_S = 20.0


GRID = [
    pytest.param(
        transport,
        num_ranks,
        layouts,
        fmt,
        id=f"{transport.name}-{num_ranks}-{'-'.join(one.id for one in layouts)}-{fmt.id}",
        marks=transport.marks,
    )
    for transport in TRANSPORTS
    for num_ranks in RANKS
    if num_ranks <= transport.max_ranks
    for layouts in ((LAYOUTS,) if transport.slow_to_make else ((one,) for one in LAYOUTS))
    for fmt in FORMATS.values()
    if fmt.quant is None or num_ranks in QUANT_RANKS
]


def run_cases(
    group: Any, transport: str, device: str, layouts: Sequence[Layout], fmt: Format
) -> int:
    """All cases on this rank; cases that agree on the Buffer's arguments share one."""
    import epcomm

    def key(case: Case) -> str:
        return repr(buffer_arguments(case, group.size(), fmt))

    done = 0
    for _, members in groupby(sorted(CASES.values(), key=key), key=key):
        cases = list(members)
        arguments = buffer_arguments(cases[0], group.size(), fmt)
        with epcomm.Buffer(group, transport=transport, timeout=TIMEOUT_S, **arguments) as buf:
            if buf.transport != transport:
                raise AssertionError(f"asked for transport {transport}, got {buf.transport}")
            able = [one for one in layouts if getattr(buf.caps, f"{one.name}_layout")]
            if not able:
                raise SkipTest(f"{transport} has none of the layouts {layouts}")
            for case, layout in product(cases, able):
                try:
                    Trial(buf, case, layout, fmt, device).run()
                except Exception as error:
                    raise AssertionError(f"case {case.id}, {layout.id}: {error}") from error
            done += len(cases)
    return done


@pytest.mark.parametrize(("transport", "num_ranks", "layouts", "fmt"), GRID)
def test_conformance(
    transport: Transport, num_ranks: int, layouts: Sequence[Layout], fmt: Format
) -> None:
    pool = launcher.pool(transport.device)
    if num_ranks > pool.size:
        pytest.skip(f"needs {num_ranks} ranks, this machine has {pool.size}")
    done = pool.run(num_ranks, run_cases, transport.name, transport.device, layouts, fmt)
    assert done == [len(CASES)] * num_ranks
