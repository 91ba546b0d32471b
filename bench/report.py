"""Turns result files of all2all.py into the tables of README.md.

    python bench/report.py bench/results/cpu.jsonl                     # prints the table
    python bench/report.py bench/results/*.jsonl --write README.md     # replaces it in README.md

The table of NAME.jsonl goes between `<!-- bench:NAME -->` and `<!-- /bench -->`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

SUPPORTED_SCHEMA = 1
# One table per combination of these.
CONFIGURATION = (
    "device",
    "driver",
    "torch",
    "ranks",
    "hidden",
    "topk",
    "experts",
    "routing",
    "commit",
)


def read_rows(path: pathlib.Path) -> list[dict]:
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text]
    for row in rows:
        if row["schema_version"] != SUPPORTED_SCHEMA:
            sys.exit(f"{path}: schema_version {row['schema_version']}, expected {SUPPORTED_SCHEMA}")
    return rows


def caption(row: dict) -> str:
    driver = f", driver {row['driver']}" if row["driver"] else ""
    return (
        f"{row['ranks']} ranks on {row['device']}{driver}, torch {row['torch']}, "
        f"commit {row['commit']}; hidden {row['hidden']}, top-{row['topk']} of {row['experts']} "
        f"experts, {row['routing']} routing. Times are p50 (p99) of the slowest rank."
    )


def time_text(row: dict | None) -> str:
    if row is None:
        return "-"
    return f"{row['p50_us']:.0f} ({row['p99_us']:.0f})"


def column_name(row: dict) -> str:
    sms = f", {row['sms']} SMs" if row["sms"] is not None else ""
    return f"{row['adapter']} {row['transport']}{sms}"


def table(rows: list[dict], cadence: str) -> str:
    """One line per operation and number of tokens of epcomm, other libraries in further columns."""
    rows = [row for row in rows if row["mode"].endswith(f"/{cadence}") and row["adapter"] != "raw"]
    ours = [row for row in rows if row["adapter"] == "epcomm"]
    others = [row for row in rows if row["adapter"] != "epcomm"]
    names = list(dict.fromkeys(column_name(row) for row in others))
    titles = ["operation", "dtype, layout", "tokens", "epcomm µs", "link GB/s", "of raw link"]
    titles += [f"{name} µs" for name in names]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "--:|" * (len(titles) - 2)]
    for row in ours:
        mode = row["mode"].partition("/")[0]
        sms = f", {row['sms']} SMs" if row["sms"] is not None else ""
        share = f"{100 * row['link_gbps'] / row['raw_gbps']:.0f} %" if row["raw_gbps"] else "-"
        cells = [
            row["operation"]
            if (row["operation"], mode) == ("combine", "replay")
            else f"{row['operation']}, {mode}",
            f"{row['dtype']}, {row['layout']}{sms}",
            str(row["tokens"]),
            time_text(row),
            f"{row['link_gbps']:.2f}",
            share,
        ]
        cells += [time_text(counterpart(row, mode, others, name)) for name in names]
        wrong = f" **{row['wrong']} wrong**" if row["wrong"] else ""
        lines.append("| " + " | ".join(cells) + f"{wrong} |")
    return "\n".join(lines)


def counterpart(row: dict, mode: str, others: list[dict], name: str) -> dict | None:
    """The other library's row for the same work; one without plans has one row for all modes."""
    same = [
        other
        for other in others
        if column_name(other) == name
        and all(other[field] == row[field] for field in ("operation", "tokens", "dtype"))
    ]
    exact = [other for other in same if other["mode"].partition("/")[0] == mode]
    packed = [other for other in same if other["mode"].startswith("packed/")]
    return next(iter(exact + packed), None)


def report(rows: list[dict], cadence: str) -> str:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in CONFIGURATION), []).append(row)
    tables = (f"{caption(group[0])}\n\n{table(group, cadence)}" for group in groups.values())
    return "\n\n".join(tables)


def replace_between_markers(text: str, name: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- bench:{re.escape(name)} -->).*?(<!-- /bench -->)", re.DOTALL)
    replaced, count = pattern.subn(lambda m: f"{m[1]}\n{content}\n{m[2]}", text)
    if count != 1:
        sys.exit(f"expected one pair <!-- bench:{name} --> ... <!-- /bench -->, found {count}")
    return replaced


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes README tables from JSONL result files.")
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE.jsonl")
    parser.add_argument("--write", type=pathlib.Path, metavar="README.md", help="update this file")
    parser.add_argument("--cadence", choices=("separate", "back-to-back"), default="separate")
    args = parser.parse_args()
    text = args.write.read_text(encoding="utf-8") if args.write else ""
    for path in args.files:
        content = report(read_rows(path), args.cadence)
        if args.write:
            text = replace_between_markers(text, path.stem, content)
        else:
            print(f"{content}\n")
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
