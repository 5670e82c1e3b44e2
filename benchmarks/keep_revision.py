"""Keeps what the dashboard needs of a sweep that a newer one is about to replace.

    python benchmarks/keep_revision.py benchmarks/results/MACHINE

Writes revisions/REVISION.json into the folder, from its bench.json: the rows of the copy, of dense
and of the fused impls, without page faults.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compacter_kernels.bench.report_page.results import FUSED, Sweep

KEPT = ("copy", "dense", *FUSED)
COLUMNS = ("k", "d", "n", "tokens", "provider", "direction", "ms", "ms_q20", "ms_q80", "over_equal_copy", "quiet")


def compact(report: dict[str, Any]) -> dict[str, Any]:
    """The report with one table, whose rows have only what the dashboard reads."""
    table = next(t for t in report["tables"] if t.get("page_faults") != "kept")
    rows = [
        {name: float(f"{row[name]:.5g}") if isinstance(row[name], float) else row[name] for name in COLUMNS}
        for row in Sweep("", report["settings"], table).rows
        if row["provider"] in KEPT
    ]
    kept = {key: table[key] for key in ("page_faults", "machine", "device", "rates") if key in table}
    return {"settings": report["settings"], "tables": [kept | {"rows": rows, "absent": []}]}


def write(folder: Path) -> Path:
    """Write the file and return its path."""
    report = compact(json.loads((folder / "bench.json").read_text(encoding="utf-8")))
    path = folder / "revisions" / f"{report['tables'][0]['machine']['revision']}.json"
    path.parent.mkdir(exist_ok=True)
    rows = report["tables"][0].pop("rows")
    text = json.dumps(report, indent=1)
    lines = ",\n".join(json.dumps(row) for row in rows)  # a row in a line, so that a change is easy to read
    path.write_text(text.replace('"absent": []', f'"absent": [],\n"rows": [\n{lines}\n]') + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(write(Path(name)))
