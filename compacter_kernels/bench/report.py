"""The results as JSON, CSV and text, with the columns of each device."""

from __future__ import annotations

import csv
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from compacter_kernels.bench.cost import BOTH, FORWARD
from compacter_kernels.bench.gate import LOOSE_UNITS

Row = dict[str, Any]
_TIME = "k d n tokens provider direction ms ms_q20 ms_q80 over_clone over_equal_copy"
_CPU = "dense_over_this model_gb_per_s model_gflops share_of_sgemm"
_CPU_SAMPLES = "samples repeated quiet calls_per_sample page_faults_per_call saved_bytes checked_tokens"
_CUDA = "fraction_of_copy dense_over_this model_gb_per_s eager_us host_us"
_CUDA_SAMPLES = (
    "samples calls_per_replay buffers calls_per_train saved_bytes error_over_limit checked_tokens peak_bytes"
)
ROW = {"cpu": f"{_TIME} {_CPU} {_CPU_SAMPLES}".split(), "cuda": f"{_TIME} {_CUDA} {_CUDA_SAMPLES}".split()}
CSV = {"cpu": ["page_faults", "dtype", "threads", *ROW["cpu"]], "cuda": ["gpu", "dtype", *ROW["cuda"]]}

LAST = "last"  # the last direction in which a provider was timed


def _cuda(title: str, direction: str) -> list[tuple[str, str, str]]:
    return [
        (title, direction, "{time}"),
        ("20-80 %", direction, "{spread}"),
        ("of copy", direction, "{fraction_of_copy:.0%}"),
        ("GB/s", direction, "{model_gb_per_s:,.0f}"),
        ("eager", direction, "{eager_us:.1f}"),
        ("host", direction, "{host_us:.1f}"),
    ]


# Heading, direction and format of each text column; `_line` adds time, spread and megabytes.
TEXT = {
    "cpu": [
        ("forward", FORWARD, "{time}"),
        ("20-80 %", FORWARD, "{spread}"),
        ("/clone", FORWARD, "{over_clone:.2f}"),
        ("dense/", FORWARD, "{dense_over_this:.2f}"),
        ("sgemm", FORWARD, "{share_of_sgemm:.0%}"),
        ("fwd+bwd", BOTH, "{time}"),
        ("20-80 %", BOTH, "{spread}"),
        ("/clone", BOTH, "{over_clone:.2f}"),
        ("/copy", BOTH, "{over_equal_copy:.2f}"),
        ("dense/", BOTH, "{dense_over_this:.2f}"),
        ("saved", LAST, "{saved_bytes:,}"),
    ],
    "cuda": [
        *_cuda("forward", FORWARD),
        *_cuda("fwd+bwd", BOTH),
        ("peak", LAST, "{peak_mb:,.1f}"),
        ("saved", LAST, "{saved_mb:,.1f}"),
    ],
}
HEAD = {
    "cpu": "{cpu}, {cores} cores, {memory_gib} GiB; torch {torch}, "
    "compacter_kernels {compacter_kernels} ({revision}), instruction set {isa}, {time}",
    "cuda": "{gpu} ({capability}, {sms} SMs, L2 {l2_mb:.0f} MB, {memory_gib} GiB), copy {copy_gb_per_s:,.0f} GB/s; "
    "driver {driver}, CUDA {cuda}, torch {torch}, triton {triton}, python {python}; {cpu}, {cores} cores; "
    "compacter_kernels {compacter_kernels} ({revision}), {time}; x in {dtype}",
}
LEGEND = {
    "cpu": """\
forward  without grad; fwd+bwd: the output, and the gradients of x and of all parameters
20-80 %  how far these quantiles are from the median, which is the time shown
/clone   over one x.clone() of the same shape (forward: the copy that moves as many bytes)
/copy    over the copy that moves as many bytes as a fused forward and backward: x.clone(), then dx = x + grad
dense/   dense over this: how many times faster than building H in each call
sgemm    share of the sgemm rate of the same rounds, by the model's operations at rank 1
saved    bytes kept for backward beyond x and the parameters
""",
    "cuda": f"""\
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
""",
}


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
