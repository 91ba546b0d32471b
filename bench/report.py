"""Turns result files of all2all.py into the tables of README.md, and into plots.

    python bench/report.py bench/results/cpu.jsonl                       # prints the table
    python bench/report.py bench/results/*.jsonl --write README.md       # replaces it in README.md
    python bench/report.py bench/results/sms-*.jsonl --plot docs/sms.png # needs matplotlib

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->` and is made from NAME.jsonl.
`bench:NAME+OTHER` makes one table of several files. What follows the names chooses rows by their
fields: `<!-- bench:NAME operation=dispatch,combine mode=fresh,replay tokens=128,4096 -->`; besides
`cadence=back-to-back` for that cadence, and `best=sms` for the fastest value of a sweep only.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

SUPPORTED_SCHEMAS = (1, 2, 3, 4)
ADDED = {  # since schema 1
    "quant": None,
    "floor_us": None,
    "alone_us": None,
    "gemm_us": None,
    "like_deep_ep": False,
    "ranks_per_node": None,
}
# One table per combination of these.
CONFIGURATION = ("device", "driver", "torch", "ranks", "hidden", "topk", "experts", "routing")
# What another library's calls are called, where it has no mode of this name.
ALIKE = {"no-sync": "fresh"}
MARKER = re.compile(
    r"^(<!-- bench:(\S+)((?: [a-z_]+=\S+)*) -->)$.*?^(<!-- /bench -->)$", re.DOTALL | re.MULTILINE
)


def read_rows(path: pathlib.Path) -> list[dict]:
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text]
    for row in rows:
        if row["schema_version"] not in SUPPORTED_SCHEMAS:
            sys.exit(
                f"{path}: schema_version {row['schema_version']}, expected one of "
                f"{', '.join(map(str, SUPPORTED_SCHEMAS))}"
            )
    return [ADDED | row for row in rows]


# Choosing rows.


def mode_of(row: dict) -> str:
    return row["mode"].partition("/")[0]


def chosen(rows: list[dict], options: dict[str, str]) -> list[dict]:
    """The rows that a marker asks for. Other adapters' rows are chosen by operation and tokens."""
    options = dict(options)
    cadence, best = options.pop("cadence", "separate"), options.pop("best", None)
    if best not in (None, "sms"):
        sys.exit(f"best={best}: expected best=sms")
    for field in options:
        if not any(field in row for row in rows):
            sys.exit(f"{field}={options[field]}: no row has such a field")
    rows = [row for row in rows if row["mode"].endswith(f"/{cadence}")]
    for field, wanted in options.items():
        values = wanted.split(",")
        rows = [
            row
            for row in rows
            if (row["adapter"] != "epcomm" and field not in ("operation", "tokens", "ranks"))
            or (mode_of(row) if field == "mode" else str(row[field])) in values
        ]
    return fastest(rows) if best else rows


def fastest(rows: list[dict]) -> list[dict]:
    """Of rows that differ in their SMs alone, the one with the least p50."""
    of: dict[tuple, dict] = {}
    for row in rows:
        fields = ("adapter", "transport", "operation", "mode", "tokens", "dtype", "quant", "layout")
        fields += ("ranks_per_node",)
        key = tuple(row[field] for field in (*fields, *CONFIGURATION, "commit"))
        if key not in of or row["p50_us"] < of[key]["p50_us"]:
            of[key] = row
    return list(of.values())


# Tables.


def caption(rows: list[dict]) -> str:
    row, commits = rows[0], list(dict.fromkeys(row["commit"] for row in rows))
    driver = f", driver {row['driver']}" if row["driver"] else ""
    commit = f", commit {commits[0]}" if len(commits) == 1 else ""
    return (
        f"{row['ranks']} ranks on {row['device']}{driver}, torch {row['torch']}{commit}; "
        f"hidden {row['hidden']}, top-{row['topk']} of {row['experts']} "
        f"experts, {row['routing']} routing. Times are p50 (p99) of the slowest rank."
    )


def microseconds(value: float) -> str:
    """Below 100 with a decimal."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def time_text(row: dict | None) -> str:
    if row is None:
        return "-"
    sms = f", {row['sms']} SMs" if row["sms"] is not None and row["adapter"] != "epcomm" else ""
    return f"{microseconds(row['p50_us'])} ({microseconds(row['p99_us'])}){sms}"


def rows_text(row: dict) -> str:
    quant = f" to {row['quant']}" if row["quant"] else ""
    sms = f", {row['sms']} SMs" if row["sms"] is not None else ""
    called = ", called as deep_ep" if row["like_deep_ep"] else ""
    return f"{row['dtype']}{quant}, {row['layout']}{sms}{called}"


def operation_text(row: dict) -> str:
    if (row["operation"], mode_of(row)) == ("combine", "replay"):
        return "combine"
    return f"{row['operation']}, {mode_of(row)}"


def link_texts(row: dict) -> list[str]:
    """Bandwidth and its share of the raw link; of a call beside a GEMM, what that hides."""
    if row["alone_us"] is not None:
        hidden = (row["alone_us"] + row["gemm_us"] - row["p50_us"]) / row["alone_us"]
        alone = f"alone {row['alone_us']:.0f}, GEMM {row['gemm_us']:.0f} µs"
        return [alone, f"{100 * hidden:.0f} % hidden"]
    share = f"{100 * row['link_gbps'] / row['raw_gbps']:.0f} %" if row["raw_gbps"] else "-"
    return [f"{row['link_gbps']:.2f}", share]


def above_floor_text(row: dict) -> str:
    """Share of the time that is not the bytes' at the raw link's best rate."""
    if not row["floor_us"]:
        return "-"
    return f"{100 * max(1 - row['floor_us'] / row['p50_us'], 0):.0f} %"


def column_name(row: dict) -> str:
    return f"{row['adapter']} {row['transport']}"


def table(rows: list[dict]) -> str:
    """One line per row of epcomm, with its transport if there are several; others in columns."""
    ours = [row for row in rows if row["adapter"] == "epcomm"]
    others = [row for row in rows if row["adapter"] not in ("epcomm", "raw")]
    names = list(dict.fromkeys(column_name(row) for row in others))
    with_commit = len({row["commit"] for row in rows}) > 1
    with_floor = any(row["floor_us"] for row in ours)
    with_transport = len({row["transport"] for row in ours}) > 1
    titles = ["operation", "dtype, layout", "tokens", "epcomm µs", "link GB/s", "of raw link"]
    titles[1:1] = ["transport"] * with_transport
    titles += ["above floor"] * with_floor
    titles += [f"{name} µs" for name in names] + ["commit"] * with_commit
    texts = 2 + with_transport
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * texts]
    lines[1] += "--:|" * (len(titles) - texts)
    for row in ours:
        cells = [
            operation_text(row),
            rows_text(row),
            str(row["tokens"]),
            time_text(row),
            *link_texts(row),
        ]
        cells[1:1] = [row["transport"]] * with_transport
        cells += [above_floor_text(row)] * with_floor
        cells += [time_text(counterpart(row, others, name)) for name in names]
        cells += [row["commit"]] * with_commit
        wrong = f" **{row['wrong']} wrong**" if row["wrong"] else ""
        lines.append("| " + " | ".join(cells) + f"{wrong} |")
    return "\n".join(lines)


def counterpart(row: dict, others: list[dict], name: str) -> dict | None:
    """The other library's row for the same work, the fastest of a sweep.

    A library without plans has one row for all modes.
    """
    fields = ("operation", "tokens", "dtype", "quant", "commit")
    same = [
        other
        for other in others
        if column_name(other) == name and all(other[field] == row[field] for field in fields)
    ]
    mode = mode_of(row)
    for wanted in (mode, ALIKE.get(mode), "packed"):
        found = [other for other in same if mode_of(other) == wanted]
        if found:
            return min(found, key=lambda other: other["p50_us"])
    return None


def report(rows: list[dict], options: dict[str, str]) -> str:
    groups: dict[tuple, list[dict]] = {}
    for row in chosen(rows, options):
        groups.setdefault(tuple(row[field] for field in CONFIGURATION), []).append(row)
    return "\n\n".join(f"{caption(group)}\n\n{table(group)}" for group in groups.values())


def with_tables(text: str, files: dict[str, list[dict]]) -> str:
    """The text with the tables of these files; other tables stay as they are."""
    written = 0

    def replaced(match: re.Match[str]) -> str:
        nonlocal written
        names = match[2].split("+")
        if not all(name in files for name in names):
            return match[0]
        written += 1
        options = dict(option.split("=", 1) for option in match[3].split())
        rows = [row for name in names for row in files[name]]
        return f"{match[1]}\n{report(rows, options)}\n{match[4]}"

    text = MARKER.sub(replaced, text)
    if not written:
        sys.exit(f"no <!-- bench:NAME --> ... <!-- /bench --> of {', '.join(files)} in the text")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes tables and plots from JSONL result files.")
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE.jsonl")
    parser.add_argument("--write", type=pathlib.Path, metavar="README.md", help="update this file")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the rows; needs matplotlib")
    parser.add_argument("--cadence", choices=("separate", "back-to-back"), default="separate")
    args = parser.parse_args()
    files = {path.stem: read_rows(path) for path in args.files}
    if args.plot:
        from plot import write_plot

        rows = [row for rows in files.values() for row in rows]
        write_plot([row for row in rows if row["mode"].endswith(f"/{args.cadence}")], args.plot)
    if args.write:
        text = with_tables(args.write.read_text(encoding="utf-8"), files)
        args.write.write_text(text, encoding="utf-8")
    elif not args.plot:
        for rows in files.values():
            print(report(rows, {"cadence": args.cadence}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
