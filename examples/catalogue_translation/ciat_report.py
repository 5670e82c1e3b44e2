"""The results of run_ciat.py as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from seed_spread import spread


def table(document: dict[str, Any]) -> str:
    """chrF of each pair and of their mean in each way: mean ± standard deviation of the seeds."""
    ways: dict[str, list[dict[str, Any]]] = document["ways"]
    pairs = list(next(iter(ways.values()))[0]["chrf"])
    lines = ["| way | numbers that train | " + " | ".join([*pairs, "mean"]) + " |", "|---" * (len(pairs) + 3) + "|"]
    for way, runs in ways.items():
        cells = [spread([run["chrf"][pair] for run in runs]) for pair in pairs]
        cells.append(spread([statistics.mean(run["chrf"].values()) for run in runs]))
        lines.append(f"| {way} | {runs[0]['trained']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(document: dict[str, Any], folder: Path) -> None:
    """Write translation.json and translation.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "translation.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / "translation.md").write_text(table(document) + "\n", encoding="utf-8")
