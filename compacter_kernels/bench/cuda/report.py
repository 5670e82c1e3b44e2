"""The results of a CUDA device as text, CSV and JSON."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

from compacter_kernels.bench.cost import BOTH, FORWARD
from compacter_kernels.bench.report import aligned, duration, number, spread
from compacter_kernels.bench.rivals import LOOSE_UNITS

LEGEND = f"""\
forward  without grad; fwd+bwd: the output, and the gradients of x and of all parameters
         cold: replays of a CUDA graph over copies of the buffers, after the L2 was flushed; the median
20-80 %  how far these quantiles are from the median
of copy  the share of the speed of a copy that moves the bytes of the fused call: forward x.clone(), fwd+bwd x.clone()
         and dx = x + grad. 100 % is the limit
GB/s     the bytes of the fused call (2 or 5 times x) over the time
eager    us per call of a train of calls back to back, until the device is done; host: until the host is
peak     memory that a forward and backward takes at once beyond its inputs, in MB
saved    bytes kept for backward beyond x and the parameters, in MB
~        not within the contract's error: computes in x's dtype, within {LOOSE_UNITS} units in its last place
-compiled  torch.compile, fullgraph, once for all token counts above 1, on the shapes of --compiled-shapes
"""
_HEAD = ["T", "provider", "forward", "20-80 %", "of copy", "GB/s", "eager", "host"]
_HEAD += ["fwd+bwd", "20-80 %", "of copy", "GB/s", "eager", "host", "peak", "saved"]


def _timing(row: dict[str, Any]) -> list[str]:
    if not row:
        return ["-"] * 6
    share, rate = number(row["fraction_of_copy"], "{:.0%}"), number(row["model_gb_per_s"], "{:,.0f}")
    host = [number(row[key], "{:.1f}") for key in ("eager_us", "host_us")]
    return [duration(row["ms"]), spread(row), share, rate, *host]


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"


def _line(tokens: str, forward: dict[str, Any], both: dict[str, Any], name: str) -> list[str]:
    off = forward["error_over_limit"]
    mark = " ~" if off is not None and off > 1 else ""
    peak, saved = (both or forward)["peak_bytes"], forward["saved_bytes"]
    return [tokens, name + mark, *_timing(forward), *_timing(both), _megabytes(peak), _megabytes(saved)]


def _block(rows: list[dict[str, Any]]) -> list[str]:
    lines, last = [_HEAD], None
    for (tokens, name), pair in itertools.groupby(rows, key=lambda row: (row["tokens"], row["provider"])):
        by_direction = {row["direction"]: row for row in pair}
        shown = str(tokens) if tokens != last else ""
        lines.append(_line(shown, by_direction[FORWARD], by_direction.get(BOTH, {}), name))
        last = tokens
    return aligned(lines)


def _notes(absent: list[dict[str, Any]]) -> list[str]:
    """One line for each reason, with the providers and the cells that it holds for."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in absent:
        found.setdefault(row["reason"], []).append(row)
    lines = []
    for reason, rows in found.items():
        who = ", ".join(dict.fromkeys(row["provider"] for row in rows))
        where = ", ".join(dict.fromkeys(row["cell"] for row in rows if "cell" in row))
        lines.append(f"absent: {who}: {reason}" + (f" ({where})" if where else ""))
    return lines


def text(report: dict[str, Any]) -> str:
    """Every table, for people."""
    blocks = []
    for table in report["tables"]:
        if "device" in table:
            device, machine = table["device"], table["machine"]
            blocks.append(
                f"{device['gpu']} ({device['capability']}, {device['sms']} SMs, L2 {device['l2_bytes'] / 1e6:.0f} MB, "
                f"{device['memory_gib']} GiB), copy {table['rates']['copy_gb_per_s']:,.0f} GB/s; "
                f"driver {device['driver']}, CUDA {device['cuda']}, torch {machine['torch']}, "
                f"triton {device['triton']}, python {machine['python']}; {machine['cpu']}, {machine['cores']} cores; "
                f"compacter_kernels {machine['compacter_kernels']} ({machine['revision'] or 'no revision'}), "
                f"{machine['time']}; x in {report['settings']['dtype']}"
            )
        for shape, rows in itertools.groupby(table["rows"], key=lambda row: (row["k"], row["d"], row["n"])):
            blocks.append("\n".join([f"{'/'.join(map(str, shape))} (k/d/n)", *_block(list(rows))]))
        blocks.append("\n".join(_notes(table["absent"])))
    return "\n\n".join([*filter(None, blocks), LEGEND])


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """bench.json, bench.csv and bench.txt in the folder, which is made; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"bench.{suffix}" for suffix in ("json", "csv", "txt")]
    paths[0].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    dtype = report["settings"]["dtype"]
    flat = [
        {"gpu": table["device"]["gpu"], "dtype": dtype, **row} for table in report["tables"] for row in table["rows"]
    ]
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]) if flat else ["gpu"])
        writer.writeheader()
        writer.writerows(flat)
    paths[2].write_text(text(report), encoding="utf-8")
    return paths
