"""Draws result rows (dicts, as in the JSONL files): time and bandwidth over tokens or over SMs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

FIELDS = (("p50_us", "p50, µs"), ("link_gbps", "link, GB/s"))


@dataclasses.dataclass
class Panel:
    """One operation: named lines of points (x, row), and what the raw link takes, by label."""

    lines: dict[str, list[tuple[int, dict[str, Any]]]]
    levels: dict[str, dict[str, Any]]


def axis_of(rows: Sequence[dict[str, Any]]) -> str:
    """A sweep over SMs, where there is one, else over tokens."""
    counts: dict[tuple, set[int]] = {}
    for row in rows:
        if row["sms"] is not None:
            key = tuple(row[field] for field in ("adapter", "operation", "mode", "tokens"))
            counts.setdefault(key, set()).add(row["sms"])
    return "sms" if any(len(values) > 1 for values in counts.values()) else "tokens"


def panels_of(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Panel]]:
    """The axis, and a panel per operation. Names hold what is not the same in all rows."""
    axis = axis_of(rows)
    named = ("adapter", "transport", "mode", "dtype", "quant", "layout", "tokens", "ranks")
    differing = [
        field
        for field in named
        if field != axis and len({row.get(field) for row in rows if row["adapter"] != "raw"}) > 1
    ]

    def name(row: dict[str, Any], fields: Sequence[str]) -> str:
        units = {"tokens": " tokens", "ranks": " ranks"}
        texts = (f"{row[f]}{units.get(f, '')}" for f in fields if row.get(f) is not None)
        return " ".join(texts) or row["adapter"]

    panels: dict[str, Panel] = {}
    for row in rows:
        panel = panels.setdefault(row["operation"], Panel({}, {}))
        if axis == "sms" and row["sms"] is None:  # the same whatever epcomm may use
            fields = [f for f in differing if f in ("dtype", "tokens", "ranks")]
            label = "raw link" if row["adapter"] == "raw" else f"{row['adapter']} {row['mode']}"
            panel.levels.setdefault(f"{label} {name(row, fields) if fields else ''}".strip(), row)
        else:
            panel.lines.setdefault(name(row, differing), []).append((row[axis], row))
    for panel in panels.values():
        for points in panel.lines.values():
            points.sort(key=lambda point: point[0])
    return axis, panels


def write_plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Needs matplotlib; the end of the path says what is written (png, svg)."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    axis, panels = panels_of(rows)
    figure, grid = plt.subplots(
        2, len(panels), figsize=(7 * len(panels), 9), squeeze=False, layout="constrained"
    )
    for column, (operation, panel) in enumerate(panels.items()):
        for place, (field, unit) in zip(grid[:, column], FIELDS, strict=True):
            for name, points in panel.lines.items():
                x = [x for x, _ in points]
                place.plot(x, [row[field] for _, row in points], marker="o", label=name)
            for name, row in panel.levels.items():
                place.axhline(row[field], linestyle="--", color="grey", alpha=0.6)
                place.annotate(name, (0.01, row[field]), xycoords=("axes fraction", "data"))
            place.set(title=operation, xlabel=axis, ylabel=unit, xscale="log", yscale="log")
            places = sorted({x for points in panel.lines.values() for x, _ in points})
            place.set_xticks(places, [str(x) for x in places], minor=False)
            place.set_xticks([], minor=True)
            place.yaxis.set_major_formatter(ScalarFormatter())
            place.yaxis.set_minor_formatter(ScalarFormatter())
            place.grid(True, which="both", alpha=0.3)
        if panel.lines:
            grid[0, column].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
