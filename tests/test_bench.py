"""bench/: what is timed and checked, on small cases over two ranks of the CPU."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launcher

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

SIZES = {"hidden": 512, "experts": 16, "topk": 4, "tokens": 9, "iters": 2, "warmup": 1}
SMALL_CASE = ["--transport", "cpu", *(f"--{name}={value}" for name, value in SIZES.items())]


@pytest.fixture(scope="module")
def pool() -> Iterator[launcher.Pool]:
    two = launcher.Pool("cpu", 2)
    yield two
    two.kill()


def run_bench(group: Any, arguments: list[str]) -> list[Any]:
    import all2all
    import arguments as command_line

    return all2all.run(command_line.parse_args(arguments))


def rows_of(pool: launcher.Pool, *arguments: str) -> list[Any]:
    every_rank = pool.run(2, run_bench, [*SMALL_CASE, *arguments])
    for rows in every_rank:
        assert rows == every_rank[0]
        assert not any(row.wrong for row in rows)
    return every_rank[0]


def test_modes(pool: launcher.Pool) -> None:
    rows = rows_of(pool, "--overlap")
    modes = {(row.adapter, row.operation, row.mode.partition("/")[0]) for row in rows}
    assert modes == {
        ("raw", "dispatch", "raw"),
        ("raw", "combine", "raw"),
        ("epcomm", "dispatch", "overlap"),
        ("epcomm", "combine", "overlap"),
        ("epcomm", "dispatch", "fresh"),
        ("epcomm", "dispatch", "replay"),
        ("epcomm", "combine", "replay"),
        ("epcomm", "pair", "fresh"),
        ("epcomm", "pair", "replay"),
        ("torch", "dispatch", "packed"),
        ("torch", "combine", "packed"),
        ("torch", "pair", "packed"),
    }
    cadences = {"separate", "back-to-back"}
    for adapter, operation, mode in modes - {m for m in modes if m[2] in ("raw", "overlap")}:
        of = [r for r in rows if (r.adapter, r.operation) == (adapter, operation)]
        assert {r.mode for r in of} >= {f"{mode}/{cadence}" for cadence in cadences}
    for row in rows:
        assert (row.alone_us is not None) == row.mode.startswith("overlap/")
        assert row.floor_us > 0 and 0 < row.p50_us <= row.p99_us
    by_operation = {row.operation: row.floor_us for row in rows}
    assert by_operation["pair"] == pytest.approx(2 * by_operation["dispatch"], abs=0.02)


def test_what_is_timed_can_be_chosen(pool: launcher.Pool, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("of an earlier run")
    chosen = ["--operations", "dispatch", "--modes", "replay,packed", "--cadence", "separate"]
    rows = rows_of(pool, *chosen, "--json", str(file))
    assert [(row.adapter, row.operation, row.mode) for row in rows] == [
        ("raw", "dispatch", "raw/separate"),
        ("raw", "combine", "raw/separate"),
        ("epcomm", "dispatch", "replay/separate"),
        ("torch", "dispatch", "packed/separate"),
    ]
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert written == [dataclasses.asdict(row) for row in rows]


def test_transports_beside_each_other(pool: launcher.Pool) -> None:
    """Other libraries run once; only the transport that has nodes is told of them."""
    chosen = ["--operations", "dispatch", "--modes", "replay,packed", "--cadence", "separate"]
    two = ["--transport", "hierarchical,cpu", "--ranks-per-node", "1"]
    rows = rows_of(pool, *chosen, *two)
    assert [(row.adapter, row.transport) for row in rows[2:]] == [
        ("epcomm", "hierarchical"),
        ("torch", "gloo"),
        ("epcomm", "cpu"),
    ]


def test_ratio_of_transports_as_text() -> None:
    import output

    values = dict.fromkeys(field.name for field in dataclasses.fields(output.Row))
    named = {"operation": "pair", "mode": "no-sync/separate"}
    one = output.Row(**values | named | {"transport": "rdma", "p50_us": 45.0})
    other = dataclasses.replace(one, transport="nvlink", p50_us=30.0)
    assert output.ratio_line(one, other) == (
        "# pair no-sync/separate: rdma 45.0 us, nvlink 30.0 us: 1.50 x"
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--transport", "nvlink,nvlink"], "different names"),
        (["--transport", "rdma,nvlink", "--transport-option", "a=b"], "--transport-option"),
        (["--transport", "nvlink", "--ranks-per-node", "2"], "--ranks-per-node"),
    ],
)
def test_transports_that_cannot_be_compared(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import arguments as command_line

    with pytest.raises(SystemExit):
        command_line.parse_args(arguments)
    assert named in capsys.readouterr().err


ROW_BYTES = {"fp8": 512 + 4 * 4, "fp8_ue8m0": 512 + 4, "nvfp4": 256 + 32}


@pytest.mark.parametrize(
    ("quant", "layout"), list(zip(ROW_BYTES, ("padded", "token", "expert"), strict=True))
)
def test_quantised(pool: launcher.Pool, quant: str, layout: str) -> None:
    rows = rows_of(pool, "--quant", quant, "--layout", layout, "--adapter", "epcomm")
    combine = next(row for row in rows if row.operation == "combine")
    dispatch = next(row for row in rows if row.operation == "dispatch")
    assert (dispatch.quant, combine.quant) == (quant, None)
    assert dispatch.bytes * 1024 == combine.bytes * ROW_BYTES[quant]


@pytest.mark.parametrize("case", [[], ["--quant", "fp8", "--layout", "padded"]])
def test_deep_ep_interface(pool: launcher.Pool, case: list[str]) -> None:
    """Its rows do what those of epcomm with --like-deep-ep do, and are named alike."""
    rows = rows_of(pool, *case, "--adapter", "epcomm,compat", "--like-deep-ep")
    work: dict[str, list[tuple[str, str]]] = {"raw": [], "epcomm": [], "compat": []}
    for row in rows:
        work[row.adapter].append((row.operation, row.mode.replace("no-sync", "fresh")))
        assert row.like_deep_ep == (row.adapter == "epcomm")
    if case:  # no plans in deep_ep's low-latency calls
        work["epcomm"] = [w for w in work["epcomm"] if w[0] == "combine" or "replay" not in w[1]]
    assert work["epcomm"] == work["compat"] != []


def test_cost_of_an_interface_as_text() -> None:
    import output

    values = dict.fromkeys(field.name for field in dataclasses.fields(output.Row))
    native = output.Row(**values | {"operation": "pair", "mode": "graph/separate", "p50_us": 50.0})
    shim = dataclasses.replace(native, p50_us=51.5)
    assert output.beside_line(shim, native) == (
        "# pair graph/separate by deep_ep's interface: 51.5 us, without it 50.0 us: +1.5 us, +3.0 %"
    )


def workload_of(quant: str) -> Any:
    from routing import RoutingSpec
    from workload import CaseConfig, Workload

    config = CaseConfig(
        rank=0,
        hidden=512,
        dtype="bf16",
        quant=quant,
        layout="token",
        expert_alignment=1,
        device=torch.device("cpu"),
        seed=3,
    )
    return Workload(config, RoutingSpec.parse("uniform").make(1, 20, 8, 2, 3))


@pytest.mark.parametrize("quant", ROW_BYTES)
def test_wrong_quantised_rows_are_counted(quant: str) -> None:
    from epcomm.quant import quantize

    workload = workload_of(quant)
    q, scales, *rest = quantize(workload.x, quant)
    global_scale = rest[0].expand(len(q)) if rest else None

    def wrong(q: torch.Tensor, scales: torch.Tensor) -> int:
        return workload.wrong_quantised(q, scales, global_scale, workload.received)

    assert wrong(q, scales) == 0
    swapped = np.arange(20)
    swapped[[4, 11]] = 11, 4
    assert wrong(q.view(torch.uint8)[swapped].view(q.dtype), scales) > 500
    one_off = q.clone()
    one_off.view(torch.uint8)[7, 33] ^= 0x40  # an exponent's bit: no rounding
    assert wrong(one_off, scales) >= 1
    assert wrong(q, torch.zeros_like(scales)) > 5000
    assert wrong(q[:-1], scales[:-1]) > 0
