"""The results as text, CSV and JSON."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

from compacter_kernels.bench.cost import BOTH, FORWARD

LEGEND = """\
forward  without grad; fwd+bwd: the output, and the gradients of x and of all parameters
20-80 %  how far these quantiles are from the median, which is the time shown
/clone   over one x.clone() of the same shape (forward: the copy that moves as many bytes)
/copy    over the copy that moves as many bytes as a fused forward and backward: x.clone(), then dx = x + grad
dense/   dense over this: how many times faster than building H in each call
sgemm    share of the sgemm rate of the same rounds, by the model's operations at rank 1
saved    bytes kept for backward beyond x and the parameters
"""


def duration(ms: float | None) -> str:
    """Milliseconds with three digits, in the unit that suits."""
    if ms is None:
        return "-"
    for factor, unit in ((1e3, "us"), (1.0, "ms"), (1e-3, "s")):
        value = ms * factor
        if value < 1000 or unit == "s":
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    raise AssertionError


def number(value: float | None, pattern: str = "{:.2f}") -> str:
    """The number by the pattern, "-" for None."""
    return "-" if value is None else pattern.format(value)


def spread(row: dict[str, Any]) -> str:
    """How far the quantiles of a row are from its median."""
    return f"{row['ms_q20'] / row['ms'] - 1:+.0%} {row['ms_q80'] / row['ms'] - 1:+.0%}" if row else "-"


def _line(tokens: str, forward: dict[str, Any], both: dict[str, Any], name: str) -> list[str]:
    mark = "" if forward["quiet"] and both.get("quiet", True) else " *"
    return [
        tokens,
        name + mark,
        duration(forward["ms"]),
        spread(forward),
        number(forward["over_clone"]),
        number(forward["dense_over_this"]),
        number(forward["share_of_sgemm"], "{:.0%}"),
        duration(both.get("ms")),
        spread(both),
        number(both.get("over_clone")),
        number(both.get("over_equal_copy")),
        number(both.get("dense_over_this")),
        number(forward["saved_bytes"], "{:,}"),
    ]


_HEAD = [
    "T",
    "provider",
    "forward",
    "20-80 %",
    "/clone",
    "dense/",
    "sgemm",
    "fwd+bwd",
    "20-80 %",
    "/clone",
    "/copy",
    "dense/",
    "saved",
]


def aligned(lines: list[list[str]]) -> list[str]:
    """The cells of a table in columns; the second is flush left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def table_text(table: dict[str, Any], dtype: str) -> str:
    """One block for each shape, then what is absent and how many samples were repeated."""
    blocks = []
    rates, machine = table["rates"], table["machine"]
    blocks.append(
        f"page faults {table['page_faults']}, {dtype}, {machine['threads']} threads, "
        f"copy {rates['copy_gb_per_s']:.1f} GB/s, sgemm {number(rates['sgemm_gflops'], '{:.0f}')} GFLOP/s"
    )
    for shape, rows in itertools.groupby(table["rows"], key=lambda row: (row["k"], row["d"], row["n"])):
        lines, last = [_HEAD], None
        for (tokens, name), pair in itertools.groupby(rows, key=lambda row: (row["tokens"], row["provider"])):
            by_direction = {row["direction"]: row for row in pair}
            shown = str(tokens) if tokens != last else ""
            lines.append(_line(shown, by_direction[FORWARD], by_direction.get(BOTH, {}), name))
            last = tokens
        blocks.append("\n".join([f"{'/'.join(map(str, shape))} (k/d/n)", *aligned(lines)]))
    notes = [
        f"absent: {' '.join(filter(None, [a.get('cell'), a['provider']]))}: {a['reason']}" for a in table["absent"]
    ]
    repeated, samples = (sum(row[key] for row in table["rows"]) for key in ("repeated", "samples"))
    notes.append(f"{repeated} samples were disturbed by other load and repeated, {samples} were not")
    if not all(row["quiet"] for row in table["rows"]):
        notes.append("* too few undisturbed samples: this row counts the disturbed ones; repeat on a quiet machine")
    return "\n\n".join([*blocks, "\n".join(notes)])


def text(report: dict[str, Any]) -> str:
    """Every table, for people."""
    machine = report["tables"][0]["machine"]
    head = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; torch {machine['torch']}, "
        f"compacter_kernels {machine['compacter_kernels']} ({machine['revision'] or 'no revision'}), "
        f"instruction set {machine['native'].get('isa_in_use', 'none')}, {machine['time']}"
    )
    dtype = report["settings"]["dtype"]
    return "\n\n".join([head, *(table_text(table, dtype) for table in report["tables"]), LEGEND])


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """bench.json, bench.csv and bench.txt in the folder, which is made; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"bench.{suffix}" for suffix in ("json", "csv", "txt")]
    paths[0].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    dtype = report["settings"]["dtype"]
    flat = [
        {"page_faults": t["page_faults"], "dtype": dtype, "threads": t["machine"]["threads"], **row}
        for t in report["tables"]
        for row in t["rows"]
    ]
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]) if flat else ["page_faults"])
        writer.writeheader()
        writer.writerows(flat)
    paths[2].write_text(text(report), encoding="utf-8")
    return paths
