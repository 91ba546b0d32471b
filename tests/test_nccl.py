"""What only the nccl transport has: its ways to move rows."""

from typing import Any

import pytest

import launcher
from cases import CASES, FORMATS
from checks import Layout
from trial import Trial, buffer_arguments

pytestmark = pytest.mark.gpu

WAYS = (
    {"algorithm": "exact", "schedule": "grouped", "chunks": 1},
    {"algorithm": "exact", "schedule": "shifted", "chunks": 8},
    {"algorithm": "exact", "chunks": 2, "ctas": 64},
    {"algorithm": "exact", "chunks": 3, "buffers": "registered"},
    {"algorithm": "static", "schedule": "grouped"},
    {"algorithm": "static", "schedule": "shifted"},
    {"algorithm": "static", "schedule": "gathered"},
    {"algorithm": "static", "buffers": "registered"},
    {"algorithm": "allgather"},
)
TIMEOUT_S = 20.0


def run_way(group: Any, way: dict[str, Any], layout: Layout) -> None:
    import epcomm

    for fmt in (FORMATS["bf16"], FORMATS["fp8"]):
        for name in ("uneven_tokens", "duplicates", "without_weights"):
            case = CASES[name]
            arguments = buffer_arguments(case, group.size(), fmt)
            with epcomm.Buffer(
                group, transport="nccl", timeout=TIMEOUT_S, transport_options=way, **arguments
            ) as buf:
                if way["algorithm"] == "exact":
                    trial = Trial(buf, case, layout, fmt, "cuda")
                    recv = trial.dispatch(0)
                    again = trial.dispatch(1, plan=recv.plan)
                    trial.combine(recv, 2, bias=True, out=True)
                    trial.combine_topk_weights(again, 4)
                    if trial.topk_weights is not None:
                        trial.combine(again, 3, weighted=True, out=True)
                    trial.check_held()
                else:
                    Trial(buf, case, layout, fmt, "cuda").run()


@pytest.mark.parametrize(
    "layout", [Layout("token"), Layout("expert", 8), Layout("padded")], ids=lambda one: one.id
)
@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(map(str, w.values())))
def test_way(way: dict[str, Any], layout: Layout) -> None:
    pool = launcher.pool("cuda")
    pool.run(pool.size, run_way, way, layout)
