"""Result rows: printed as a table while they come, written as JSONL, CSV or a plot."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
import platform
import subprocess
import sys
from typing import IO

import torch

SCHEMA_VERSION = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table and of the JSONL file; see docs/benchmarking.md for each field."""

    schema_version: int
    adapter: str
    transport: str
    operation: str
    mode: str
    tokens: int
    hidden: int
    topk: int
    experts: int
    ranks: int
    ranks_per_node: int | None
    dtype: str
    quant: str | None
    layout: str
    like_deep_ep: bool
    sms: int | None
    routing: str
    bytes: int
    iterations: int
    p50_us: float
    p99_us: float
    link_gbps: float
    logical_gbps: float
    raw_gbps: float
    floor_us: float
    alone_us: float | None
    gemm_us: float | None
    wrong: int
    device: str
    driver: str | None
    torch: str
    commit: str


COLUMNS = (  # title, width, text of a row
    ("adapter", -8, lambda row: row.adapter),
    ("transport", -11, lambda row: row.transport),
    ("operation", -9, lambda row: row.operation),
    ("mode", -20, lambda row: row.mode),
    ("sms", 4, lambda row: "-" if row.sms is None else str(row.sms)),
    ("tokens", 7, lambda row: str(row.tokens)),
    ("bytes", 11, lambda row: str(row.bytes)),
    ("p50 us", 11, lambda row: f"{row.p50_us:.1f}"),
    ("p99 us", 11, lambda row: f"{row.p99_us:.1f}"),
    ("link GB/s", 10, lambda row: f"{row.link_gbps:.2f}"),
    ("logical GB/s", 13, lambda row: f"{row.logical_gbps:.2f}"),
    ("of raw", 7, lambda row: share_of_raw(row.link_gbps, row.raw_gbps)),
    ("above", 6, lambda row: share_above_floor(row.p50_us, row.floor_us)),
    # The raw link is timed, not checked.
    ("#wrong", 7, lambda row: "-" if row.adapter == "raw" else str(row.wrong)),
)


def share_of_raw(link_gbps: float, raw_gbps: float) -> str:
    """Percent of the raw link, or - where nothing crossed it."""
    return f"{100 * link_gbps / raw_gbps:.0f} %" if raw_gbps > 0 else "-"


def share_above_floor(p50_us: float, floor_us: float) -> str:
    """Percent of the time that is not the bytes', at the raw link's best rate."""
    return f"{100 * max(1 - floor_us / p50_us, 0):.0f} %"


def overlap_line(row: Row) -> str:
    """What a row with a GEMM beside it says."""
    assert row.alone_us is not None and row.gemm_us is not None
    hidden = (row.alone_us + row.gemm_us - row.p50_us) / row.alone_us
    return (
        f"# {row.operation} beside a GEMM: alone {row.alone_us:.1f} us, GEMM {row.gemm_us:.1f} us, "
        f"together {row.p50_us:.1f} us: {100 * hidden:.0f} % of the communication hidden"
    )


def beside_line(shim: Row, native: Row) -> str:
    """What a call through deep_ep's interface costs more than the same work without it."""
    more = shim.p50_us - native.p50_us
    return (
        f"# {shim.operation} {shim.mode} by deep_ep's interface: {shim.p50_us:.1f} us, without it "
        f"{native.p50_us:.1f} us: {more:+.1f} us, {100 * more / native.p50_us:+.1f} %"
    )


def ratio_line(row: Row, of: Row) -> str:
    """How much longer one transport takes than another for the same."""
    return (
        f"# {row.operation} {row.mode}: {row.transport} {row.p50_us:.1f} us, {of.transport} "
        f"{of.p50_us:.1f} us: {row.p50_us / of.p50_us:.2f} x"
    )


def _aligned(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def header() -> str:
    return "# " + " ".join(_aligned(title, width) for title, width, _ in COLUMNS)


def line(row: Row) -> str:
    return "  " + " ".join(_aligned(text(row), width) for _, width, text in COLUMNS)


class Progress:
    """One changing line on a terminal; nothing where standard error is not one."""

    def __init__(self, stream: IO[str] = sys.stderr):
        self._stream = stream
        self._on = stream.isatty()

    def show(self, text: str) -> None:
        if self._on:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()

    def clear(self) -> None:
        self.show("")


def append_json(row: Row, path: str) -> None:
    with pathlib.Path(path).open("a", encoding="utf-8") as out:
        out.write(json.dumps(dataclasses.asdict(row)) + "\n")


def write_csv(rows: list[Row], path: str) -> None:
    with pathlib.Path(path).open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


# Where the numbers come from.


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    for text in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = text.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def driver_version(device: torch.device) -> str | None:
    """Of the GPU; None on the CPU."""
    if device.type == "cpu":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(command) or "unknown"


def commit() -> str:
    """The checkout's commit, with -dirty if tracked files differ from it."""
    git = ["git", "-C", str(pathlib.Path(__file__).resolve().parent)]
    head = _first_line([*git, "rev-parse", "--short=12", "HEAD"])
    if not head:
        return "unknown"
    dirty = _first_line([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{head}-dirty" if dirty else head


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
