"""The figures of the README are those of the committed results."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import text_report as report

ROOT = Path(__file__).parents[1]


def test_the_table_of_topics_is_that_of_its_json() -> None:
    folder = ROOT / "benchmarks" / "results" / "topics"
    document = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    assert report.table(document["methods"]) in (folder / "train.txt").read_text(encoding="utf-8")
    for row, results in zip(document["methods"], document["test"].values(), strict=True):
        assert row["mean"] == statistics.mean(100 * result["accuracy"] for result in results)
        assert len(results) == document["settings"]["seeds"]


def test_the_readme_states_the_committed_results() -> None:
    command = [sys.executable, "benchmarks/readme_table.py", "--check"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr or "run python benchmarks/readme_table.py"


def test_the_page_on_models_states_the_committed_results() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    document = json.loads((ROOT / "benchmarks" / "results" / "topics" / "train.json").read_text(encoding="utf-8"))
    for row in document["methods"]:
        cells = f"| {row['mean']:.2f} ± {row['std']:.2f} | {row['trainable_parameters']:,} |"
        assert f"| {row['method']} {cells}" in page
