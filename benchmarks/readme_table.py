"""Writes the tables of README.md, docs and examples from the committed results.

    python benchmarks/readme_table.py [--check]

With --check it writes nothing, and exits with 1 if a table differs from the results.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from compacter_kernels.bench.report import duration

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results/epyc-2core/bench.json")
CELLS = [(768, 24, 4, 1), (768, 24, 4, 8192), (768, 48, 12, 2048), (1024, 64, 8, 8192), (4096, 128, 8, 2048)]
RIVALS = ("dense", "factored", "factored-compiled")
HEAD = """\
| k/d/n | tokens | forward | of a copy | dense, factored, compiled | forward+backward | dense, factored, compiled |
|---|---|---|---|---|---|---|
"""
LEGEND = """
fp32, {threads} threads of a 2-core {cpu} with {isa}, torch {torch}, page faults removed.
*Of a copy*: the time of the fused call over that of one `x.clone()`. *Dense, factored, compiled*: how many times as
long the same call takes with H built in each call (every implementation in use), through `factored`, and through
`factored` under `torch.compile`. All of it, with quantiles and with page faults: [{results}]({results}).
"""


COPY_TOKENS = (1, 256, 2048, 8192, 32768)
COPY_LEGEND = """
fp32, {threads} threads of a 2-core {cpu} with {isa}, torch {torch}, page faults removed
([{results}](../{results})).
"""

STEPS = Path("benchmarks/results/xeon-2core")
STEPS_HEAD = """\
{model}, batch {batch} x {length}, {rounds} rounds ([{results}](../{results})):

| | step | share of the step | of `adapters`' | kept for backward | peak memory | trained |
|---|---|---|---|---|---|---|
"""
STEPS_LEGEND = """
{threads} threads of a 2-core {cpu}, torch {torch}, transformers {transformers}, adapters {adapters}.
"""

SIZES = Path("benchmarks/results/xeon-avx512-2core/sizes.json")
ERRORS = Path("benchmarks/results/choose_sizes/sizes.json")
SIZES_HEAD = """\
| n | r | factor | parameters | forward+backward | of a copy | error % |
|---|---|---|---|---|---|---|
"""
SIZES_LEGEND = """
Parameters and time: one adapter of width {width}, {tokens} tokens, float32, {threads} thread of a 2-core {cpu},
torch {torch} ([{results}](../{results})).
Error: a transformer of width 128 on handwritten digits, mean and standard deviation of {seeds} seeds
([{errors}](../{errors})).
"""

LOKR = Path("benchmarks/results/xeon-avx512-2core/lokr.json")
LOKR_HEAD = """\
| | without LoKr | as shipped | patched | shipped / patched | share | kept, shipped | kept, patched |
|---|---|---|---|---|---|---|---|
"""
LOKR_LEGEND = """
Peak memory of three steps of the transformer: {base:.0f} MiB without LoKr, {shipped:.0f} MiB as shipped,
{patched:.0f} MiB patched. fp32, {threads} thread of a 2-core {cpu}, torch {torch}, peft {peft},
diffusers {diffusers} ([{results}](../{results})).
"""


def _row(rows: list[dict[str, Any]], cell: tuple[int, ...], provider: str, direction: str) -> dict[str, Any]:
    for row in rows:
        here = (row["k"], row["d"], row["n"], row["tokens"])
        if here == cell and row["provider"] == provider and row["direction"] == direction:
            return row
    raise SystemExit(f"{RESULTS} has no {direction} row of {provider} at {cell}")


def _times(rows: list[dict[str, Any]], cell: tuple[int, ...], direction: str) -> tuple[str, str]:
    fused = _row(rows, cell, "cpu", direction)["ms"]
    ratios = [f"{_row(rows, cell, rival, direction)['ms'] / fused:.1f}" for rival in RIVALS]
    return duration(fused), " / ".join(ratios)


def table() -> str:
    """The region of the README between the two marks."""
    report = json.loads((ROOT / RESULTS).read_text(encoding="utf-8"))
    measured = next(t for t in report["tables"] if t["page_faults"] == "removed")
    rows, machine = measured["rows"], measured["machine"]
    lines = []
    for cell in CELLS:
        k, d, n, tokens = cell
        forward, forward_ratios = _times(rows, cell, "forward")
        both, both_ratios = _times(rows, cell, "forward+backward")
        clone = _row(rows, cell, "cpu", "forward")["over_clone"]
        values = [f"{k}/{d}/{n}", str(tokens), forward, f"{clone:.2f}", forward_ratios, both, both_ratios]
        lines.append(f"| {' | '.join(values)} |\n")
    legend = LEGEND.format(
        threads=machine["threads"],
        cpu=machine["cpu"],
        isa=machine["native"]["isa_in_use"],
        torch=machine["torch"],
        results=RESULTS.parent.joinpath("bench.txt"),
    )
    return HEAD + "".join(lines) + legend


def copy() -> str:
    """The region of docs/cpu.md: the time of each call over that of a copy of the same bytes."""
    report = json.loads((ROOT / RESULTS).read_text(encoding="utf-8"))
    measured = next(t for t in report["tables"] if t["page_faults"] == "removed")
    machine = measured["machine"]
    lines = [f"| k/d/n | tokens | {' | '.join(map(str, COPY_TOKENS))} |\n", "|---" * 7 + "|\n"]
    for shape in report["settings"]["shapes"]:
        for direction in ("forward", "forward+backward"):
            rows = [_row(measured["rows"], (*shape, tokens), "cpu", direction) for tokens in COPY_TOKENS]
            cells = [f"{row['over_equal_copy']:.1f}{'' if row['quiet'] else '*'}" for row in rows]
            lines.append(f"| {'/'.join(map(str, shape))} | {direction} | {' | '.join(cells)} |\n")
    legend = COPY_LEGEND.format(
        threads=machine["threads"],
        cpu=machine["cpu"],
        isa=machine["native"]["isa_in_use"],
        torch=machine["torch"],
        results=RESULTS.with_name("bench.txt"),
    )
    return "".join(lines) + legend


def sizes() -> str:
    """The region of docs/choosing.md: parameters, time and error of adapters of several sizes."""
    report, of_digits = (json.loads((ROOT / path).read_text(encoding="utf-8")) for path in (SIZES, ERRORS))
    names = ("phm_dim", "phm_rank", "reduction_factor")
    errors = {tuple(row[name] for name in names): row["errors"] for row in of_digits["rows"]}
    lines = [SIZES_HEAD]
    for row in report["rows"]:
        wrong = errors[tuple(row[name] for name in names)]
        n, r = ("plain", "") if row["phm_dim"] is None else (row["phm_dim"], row["phm_rank"])
        cells = (
            n,
            r,
            row["reduction_factor"],
            f"{row['parameters']:,}",
            f"{row['ms']:.2f} ms{'' if row['quiet'] else '*'}",
            f"{row['over_copy']:.1f}",
            f"{statistics.mean(wrong):.1f} ± {statistics.stdev(wrong):.1f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |\n")
    about = {**report["machine"], **of_digits["settings"], "width": report["width"], "tokens": report["tokens"]}
    return "".join(lines) + SIZES_LEGEND.format(
        **about, results=SIZES.with_suffix(".txt"), errors=ERRORS.with_suffix(".txt")
    )


def steps() -> str:
    """The region of docs/cost.md: the costs that adapters add to a training step of a model."""
    lines = []
    for model in ("bert-base", "t5-base"):
        path = STEPS / f"model_step_{model}.json"
        report = json.loads((ROOT / path).read_text(encoding="utf-8"))
        rows = report["rows"]
        lines.append(STEPS_HEAD.format(**report, results=path.with_suffix(".txt")))
        for row in rows.values():
            share = f"{row['share_ms']:.0f} ms ({row['share_ms_10']:.0f} to {row['share_ms_90']:.0f})"
            ratio = f"{row['share_ms'] / rows['adapters']['share_ms']:.2f}"
            times = [f"{row['step_ms']:.0f} ms", *((share, ratio) if row["trained"] else ("", ""))]
            memory = [f"{row[key] / 2**20:.0f} MiB" for key in ("saved_bytes", "peak_bytes")]
            lines.append(f"| {' | '.join([row['what'], *times, *memory, format(row['trained'], ',')])} |\n")
        lines.append("\n")
    return "".join(lines[:-1]) + STEPS_LEGEND.format(**report["machine"], **report["versions"])


def lokr() -> str:
    """The region of docs/existing-scripts.md: steps with LoKr of peft, as shipped and patched."""
    report = json.loads((ROOT / LOKR).read_text(encoding="utf-8"))
    lines = []
    for line in (*report["layers"], report["transformer"]):
        base, shipped, patched = line["rows"].values()
        times = [f"{row['ms']:.0f} ms" + ("" if row["quiet"] else "*") for row in (base, shipped, patched)]
        ratios = [f"{line[key]:.1f}" for key in ("step_ratio", "share_ratio")]
        kept = [f"{row['saved_bytes'] / 2**20:.0f} MiB" for row in (shipped, patched)]
        lines.append(f"| {' | '.join([line['what'], *times, *ratios, *kept])} |\n")
    peaks = {name: row["peak_bytes"] / 2**20 for name, row in report["transformer"]["rows"].items()}
    about = {**report["machine"], **report["versions"], "results": LOKR.with_suffix(".txt")}
    return LOKR_HEAD + "".join(lines) + LOKR_LEGEND.format(**peaks, **about)


def compressed_attention() -> str:
    """The region of the README of examples/compressed_attention, which its command has written."""
    return (ROOT / "benchmarks/results/zen4-2core/compressed_attention.txt").read_text(encoding="utf-8")


def speech_translation() -> str:
    """The region of the README of examples/speech_translation, which its command has written."""
    return (ROOT / "benchmarks/results/speech_translation/translation.txt").read_text(encoding="utf-8")


REGIONS = (
    ("README.md", "results", table),
    ("docs/choosing.md", "sizes", sizes),
    ("docs/cpu.md", "copy", copy),
    ("docs/cost.md", "steps", steps),
    ("docs/existing-scripts.md", "lokr", lokr),
    ("examples/compressed_attention/README.md", "results", compressed_attention),
    ("examples/speech_translation/README.md", "results", speech_translation),
)


def main(regions: Iterable[tuple[str, str, Callable[[], str]]] = REGIONS) -> int:
    """Write the regions of pages, between marks of their names, or with --check compare them."""
    stale = 0
    for page, name, region in regions:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(f"<!-- {name}:begin -->\n")
        _, after = rest.split(f"<!-- {name}:end -->\n")
        new = f"{before}<!-- {name}:begin -->\n{region()}<!-- {name}:end -->\n{after}"
        stale += new != text
        if "--check" not in sys.argv[1:]:
            path.write_text(new, encoding="utf-8")
    return int("--check" in sys.argv[1:] and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
