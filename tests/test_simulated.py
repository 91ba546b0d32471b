"""The GPU transports on simulated devices: the conformance cases, without a GPU."""

import pytest

import launcher
from cases import CASES, FORMATS
from simulated import needs_simulator
from test_conformance import LAYOUTS, run_cases

pytestmark = needs_simulator


# Every format and every number of ranks, not each with each: a simulated GPU is slow.
GRID = [(1, "bf16"), (2, "fp32"), (2, "packed"), (3, "fp16"), (4, "bf16"), (4, "fp8")]


@pytest.mark.parametrize(("num_ranks", "fmt"), GRID)
def test_nvlink(num_ranks: int, fmt: str) -> None:
    pool = launcher.pool("simulated")
    done = pool.run(num_ranks, run_cases, "nvlink", "cpu", LAYOUTS, FORMATS[fmt], timeout=300.0)
    assert done == [len(CASES)] * num_ranks
