"""Writes the measured table of README.md from committed results: `python benchmarks/readme_table.py`.

With --check it writes nothing and exits 1 where the table is not what the results say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compacter_kernels.bench.report import duration

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = Path("benchmarks/results/epyc-2core/bench.json")
CELLS = [(768, 24, 4, 1), (768, 24, 4, 8192), (768, 48, 12, 2048), (1024, 64, 8, 8192), (4096, 128, 8, 2048)]
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->\n"
RIVALS = ("dense", "factored", "factored-compiled")
HEAD = """\
| k/d/n | tokens | forward | of a copy | dense, factored, compiled | forward+backward | dense, factored, compiled |
|---|---|---|---|---|---|---|
"""
LEGEND = """
fp32, {threads} threads of a 2-core {cpu} with {isa}, torch {torch}, page faults removed.
*Of a copy*: the time of the fused call over that of one `x.clone()`. *Dense, factored, compiled*: how many times as
long the same step takes with H built in each call (every implementation in use), through `factored`, and through
`factored` under `torch.compile`. All of it, with quantiles and with page faults: [{results}]({results}).
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


def main() -> int:
    """Rewrite the region, or with --check compare it."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = before + BEGIN + table() + END + after
    if "--check" in sys.argv[1:]:
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
