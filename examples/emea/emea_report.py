"""The results of run_emea.py as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seed_spread import spread


def table(document: dict[str, Any]) -> str:
    """F1 of each test language and each way, mean ± standard deviation over the seeds."""
    results = document["results"]
    ways = list(next(iter(results.values()))[0]["f1"])
    gain = f"{ways[-1]} − uniform"
    lines = ["| language | sentences | " + " | ".join([*ways, gain]) + " |", "|---" * (len(ways) + 3) + "|"]
    for language, runs in results.items():
        cells = [spread([run["f1"][way] for run in runs]) for way in ways]
        cells.append(spread([run["f1"][ways[-1]] - run["f1"]["uniform"] for run in runs], sign="+"))
        lines.append(f"| {language} | {runs[0]['sentences']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(document: dict[str, Any], folder: Path) -> None:
    """Write results.json and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table(document) + "\n", encoding="utf-8")
