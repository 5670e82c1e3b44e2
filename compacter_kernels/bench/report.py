"""The results as JSON, CSV and text."""

from __future__ import annotations

import csv
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from compacter_kernels.bench.columns import CSV, HEAD, LAST, LEGEND, TEXT

Row = dict[str, Any]


def duration(ms: float | None) -> str:
    """Return milliseconds with three digits, in the unit that suits; "-" for None."""
    if ms is None:
        return "-"
    value, unit = (ms * 1e3, "us") if ms < 1 else (ms, "ms") if ms < 1000 else (ms / 1e3, "s")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def _text(pattern: str, row: Row) -> str:
    """Return the values of a row by the pattern, or "-" where the row lacks one or has None."""
    try:
        return pattern.format_map(row)
    except (KeyError, TypeError):
        return "-"


def _line(device: str, tokens: str, name: str, rows: list[Row]) -> list[str]:
    """Return a line of a table, for the rows of a provider in its directions.

    The name gets * for too few undisturbed samples, and ~ for an error beyond the contract.
    """
    by_direction: dict[str, Row] = {}
    for row in rows:
        ms, low, high = (row[key] for key in ("ms", "ms_q20", "ms_q80"))
        shown = {**row, "time": duration(ms), "spread": f"{low / ms - 1:+.0%} {high / ms - 1:+.0%}"}
        sizes = ((key, row.get(f"{key}_bytes")) for key in ("peak", "saved"))
        shown |= {f"{key}_mb": size / 1e6 for key, size in sizes if size is not None}
        by_direction[row["direction"]] = by_direction[LAST] = shown
    if not all(row.get("quiet", True) for row in rows):
        name += " *"
    if (rows[0].get("error_over_limit") or 0) > 1:
        name += " ~"
    return [tokens, name, *(_text(pattern, by_direction.get(which, {})) for _, which, pattern in TEXT[device])]


def _block(device: str, shape: tuple[int, ...], rows: list[Row]) -> str:
    """Return the table of a shape with aligned columns; the second is flush left."""
    lines, last = [["T", "provider", *(heading for heading, _, _ in TEXT[device])]], None
    for (tokens, name), group in groupby(rows, key=lambda row: (row["tokens"], row["provider"])):
        lines.append(_line(device, "" if tokens == last else str(tokens), name, list(group)))
        last = tokens
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pattern = "  ".join(f"{{:{'<' if i == 1 else '>'}{width}}}" for i, width in enumerate(widths))
    table = [pattern.format(*line).rstrip() for line in lines]
    return "\n".join([f"{'/'.join(map(str, shape))} (k/d/n)", *table])


def _notes(device: str, table: dict[str, Any]) -> list[str]:
    """Return one line for each reason why providers are absent, then the disturbed samples."""
    absent: dict[str, list[Row]] = {}
    for row in table["absent"]:
        absent.setdefault(row["reason"], []).append(row)
    lines = []
    for reason, rows in absent.items():
        providers = ", ".join(dict.fromkeys(row["provider"] for row in rows))
        cells = ", ".join(dict.fromkeys(row["cell"] for row in rows if "cell" in row))
        lines.append(f"absent: {providers}: {reason}" + (f" ({cells})" if cells else ""))
    if device == "cpu":
        repeated, samples = (sum(row[name] for row in table["rows"]) for name in ("repeated", "samples"))
        lines.append(f"{repeated} samples were disturbed by other load and repeated, {samples} were not")
        if not all(row["quiet"] for row in table["rows"]):
            lines.append("* too few undisturbed samples: this row counts the disturbed ones; repeat on a quiet machine")
    return lines


def table_text(device: str, table: dict[str, Any], dtype: str) -> str:
    """Return one block for each shape, then the notes; on the CPU below a title."""
    blocks = []
    if device == "cpu":
        rates = table["rates"]
        blocks.append(
            f"page faults {table['page_faults']}, {dtype}, {table['machine']['threads']} threads, "
            f"copy {rates['copy_gb_per_s']:.1f} GB/s, sgemm {_text('{sgemm_gflops:.0f}', rates)} GFLOP/s"
        )
    for shape, rows in groupby(table["rows"], key=lambda row: (row["k"], row["d"], row["n"])):
        blocks.append(_block(device, shape, list(rows)))
    return "\n\n".join(filter(None, [*blocks, "\n".join(_notes(device, table))]))


def text(report: dict[str, Any]) -> str:
    """Return every table, below a line on the machine and above the legend."""
    device, dtype, tables = report["settings"]["device"], report["settings"]["dtype"], report["tables"]
    blocks = [table_text(device, table, dtype) for table in tables]
    if "machine" in tables[0]:  # otherwise no shape was measured
        machine, gpu = tables[0]["machine"], tables[0].get("device", {})
        facts = {**machine, **gpu, **tables[0]["rates"], "dtype": dtype, "l2_mb": gpu.get("l2_bytes", 0) / 1e6}
        facts["revision"] = machine["revision"] or "no revision"
        facts["isa"] = machine.get("native", {}).get("isa_in_use", "none")
        blocks.insert(0, HEAD[device].format_map(facts))
    return "\n\n".join([*filter(None, blocks), LEGEND[device]])


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write bench.json, bench.csv and bench.txt into the folder, and return their paths."""
    device, dtype = report["settings"]["device"], report["settings"]["dtype"]
    paths = [folder / f"bench.{suffix}" for suffix in ("json", "csv", "txt")]
    paths[0].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV[device], extrasaction="ignore")
        writer.writeheader()
        for table in report["tables"]:
            facts = {"dtype": dtype, "page_faults": table.get("page_faults")}
            facts |= {"threads": table.get("machine", {}).get("threads"), "gpu": table.get("device", {}).get("gpu")}
            writer.writerows({**facts, **row} for row in table["rows"])
    paths[2].write_text(text(report), encoding="utf-8")
    return paths
