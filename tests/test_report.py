"""bench/report.py and bench/plot.py on made-up rows, and the tables that the repository shows."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import plot  # noqa: E402
import report  # noqa: E402


def row(adapter: str, operation: str, mode: str, p50: float, **changes: Any) -> dict[str, Any]:
    made = {
        "schema_version": 4,
        "adapter": adapter,
        "transport": {"raw": "copy-engine", "deep_ep": "nvlink", "torch": "nccl"}.get(
            adapter, "nvlink"
        ),
        "operation": operation,
        "mode": mode if "/" in mode else f"{mode}/separate",
        "tokens": 4096,
        "hidden": 7168,
        "topk": 8,
        "experts": 256,
        "ranks": 4,
        "ranks_per_node": None,
        "dtype": "bf16",
        "quant": None,
        "layout": "token",
        "like_deep_ep": False,
        "sms": None,
        "routing": "uniform",
        "bytes": 150_000_000,
        "iterations": 200,
        "p50_us": p50,
        "p99_us": p50 + 10,
        "link_gbps": 150_000 / p50,
        "logical_gbps": 200_000 / p50,
        "raw_gbps": 300.0,
        "floor_us": 400.0,
        "alone_us": None,
        "gemm_us": None,
        "wrong": 0,
        "device": "GPU",
        "driver": "1.2",
        "torch": "2.0",
        "commit": "abc",
    }
    return made | changes


ROWS = [
    row("raw", "dispatch", "raw", 500.0),
    *[row("epcomm", "dispatch", "replay", 900.0 - 10 * n, sms=n) for n in (4, 16, 32)],
    *[row("epcomm", "dispatch", "replay/back-to-back", 90.0, sms=n) for n in (4, 16, 32)],
    row("epcomm", "combine", "replay", 700.0, sms=16, commit="def"),
    row("epcomm", "dispatch", "no-sync", 800.0, quant="fp8", layout="padded"),
    row("deep_ep", "dispatch", "replay", 865.0, sms=24),
    row("deep_ep", "dispatch", "replay", 850.0, sms=32),
    row("deep_ep", "dispatch", "fresh", 927.0, sms=24, quant="fp8", layout="padded"),
    row("torch", "dispatch", "packed", 642.0),
    row("epcomm", "dispatch", "overlap", 1000.0, sms=16, alone_us=500.0, gemm_us=900.0),
]


def test_transports_are_told_apart() -> None:
    rows = [
        row("epcomm", "dispatch", "replay", 45.0, transport="rdma"),
        row("epcomm", "dispatch", "replay", 30.0),
        row("torch", "dispatch", "packed", 60.0),
    ]
    lines = [line.split(" | ") for line in report.report(rows, {}).splitlines()[2:]]
    assert [line[:2] for line in lines[2:]] == [
        ["| dispatch, replay", "rdma"],
        ["| dispatch, replay", "nvlink"],
    ]
    assert [line[4] for line in lines[2:]] == ["45.0 (55.0)", "30.0 (40.0)"]
    assert len({len(line) for line in (lines[0], *lines[2:])}) == 1
    assert "transport" not in report.report(rows[1:], {})


def lines_of(options: dict[str, str]) -> list[list[str]]:
    text = report.report(ROWS, options)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def test_table() -> None:
    title, _, *lines = lines_of({})
    assert title == [
        "operation",
        "dtype, layout",
        "tokens",
        "epcomm µs",
        "link GB/s",
        "of raw link",
        "above floor",
        "deep_ep nvlink µs",
        "torch nccl µs",
        "commit",
    ]
    cells = {(line[0], line[1]): line[2:] for line in lines}
    assert len(cells) == len(lines) == 6
    beside = ["850 (860), 32 SMs", "642 (652)", "abc"]
    first = ["4096", "860 (870)", "174.42", "58 %", "53 %", *beside]
    assert cells["dispatch, replay", "bf16, token, 4 SMs"] == first
    # What another commit measured is not held beside it.
    assert cells["combine", "bf16, token, 16 SMs"][-3:] == ["-", "-", "def"]
    # A library that never waits for the host has no mode of its own for that.
    assert cells["dispatch, no-sync", "bf16 to fp8, padded"][5:7] == ["927 (937), 24 SMs", "-"]
    overlap = cells["dispatch, overlap", "bf16, token, 16 SMs"]
    assert overlap[2:4] == ["alone 500, GEMM 900 µs", "80 % hidden"]
    assert "commit" not in report.report(ROWS, {}).splitlines()[0]


def test_rows_are_chosen() -> None:
    def times(**options: str) -> list[str]:
        return [line[3] for line in lines_of(options)[2:]]

    assert times(cadence="back-to-back") == ["90.0 (100)"] * 3
    assert times(best="sms", mode="replay") == ["580 (590)", "700 (710)"]
    assert times(mode="replay", sms="16,32", operation="dispatch") == ["740 (750)", "580 (590)"]
    assert times(tokens="128") == []
    with pytest.raises(SystemExit, match="colour"):
        report.report(ROWS, {"colour": "red"})


def test_tables_are_replaced() -> None:
    text = (
        "a\n<!-- bench:one -->\nold\n<!-- /bench -->\nb\n"
        "<!-- bench:one+two mode=replay best=sms -->\n<!-- /bench -->\n"
        "<!-- bench:three -->\nkept\n<!-- /bench -->\n"
    )
    made = report.with_tables(text, {"one": ROWS[:4], "two": ROWS[7:8]})
    assert "old" not in made and "kept" in made
    first, second = made.split("\nb\n")
    assert first.count("| dispatch, replay") == 3
    assert second.count("| dispatch, replay") == 1 and second.count("| combine") == 1
    assert report.with_tables(made, {"one": ROWS[:4], "two": ROWS[7:8]}) == made
    with pytest.raises(SystemExit, match="four"):
        report.with_tables(text, {"four": ROWS})


def test_wrong_elements_stand_out() -> None:
    assert "**3 wrong**" in report.report([row("epcomm", "combine", "replay", 9.0, wrong=3)], {})


def test_schemas(tmp_path: Path) -> None:
    old = {k: v for k, v in ROWS[1].items() if k not in report.ADDED} | {"schema_version": 1}
    file = tmp_path / "old.jsonl"
    file.write_text(json.dumps(old) + "\n")
    assert "above floor" not in report.report(report.read_rows(file), {})
    file.write_text(json.dumps(old | {"schema_version": 5}) + "\n")
    with pytest.raises(SystemExit, match="schema_version 5"):
        report.read_rows(file)


@pytest.mark.parametrize("document", ["README.md", *sorted(ROOT.glob("docs/*.md"))])
def test_shown_tables_are_those_of_the_results(document: str | Path) -> None:
    text = (ROOT / document).read_text()
    names = {name for match in report.MARKER.finditer(text) for name in match[2].split("+")}
    if document == "README.md":
        assert names
    if names:
        files = {n: report.read_rows(ROOT / f"bench/results/{n}.jsonl") for n in sorted(names)}
        assert report.with_tables(text, files) == text


SWEEP = [r for r in ROWS if r["mode"].endswith("/separate") and r["alone_us"] is None]


def test_plot_of_a_sweep() -> None:
    axis, panels = plot.panels_of(SWEEP)
    assert axis == "sms"
    assert list(panels) == ["dispatch", "combine"]
    lines = {
        name: [(x, r["p50_us"]) for x, r in points]
        for name, points in panels["dispatch"].lines.items()
    }
    ours = next(points for name, points in lines.items() if name.startswith("epcomm"))
    assert ours == [(4, 860.0), (16, 740.0), (32, 580.0)]
    assert panels["dispatch"].levels["raw link"]["p50_us"] == 500.0
    assert any(name.startswith("torch") for name in panels["dispatch"].levels)


def test_plot_over_tokens() -> None:
    rows = [row("epcomm", "dispatch", "replay", 10.0 * n, tokens=n) for n in (64, 1, 8)]
    axis, panels = plot.panels_of(rows)
    assert axis == "tokens"
    assert [x for x, _ in panels["dispatch"].lines["epcomm"]] == [1, 8, 64]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_is_written(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"sweep.{kind}"
    plot.write_plot(SWEEP, str(file))
    assert file.stat().st_size > 5000
