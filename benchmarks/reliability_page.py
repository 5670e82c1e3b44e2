"""Counts what the tests of failures try, and writes the table of docs/reliability.md.

    python benchmarks/reliability_page.py --run        runs the tests and writes the counts
    python benchmarks/reliability_page.py [--check]    writes the table from the counts

With --check it writes nothing, and exits with 1 if the table differs from the counts.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from readme_table import main as write_regions

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ROOT / "benchmarks/results/reliability/counts.json"
MARK = "@pytest.mark.failure("
HEAD = "| failure | tests | inputs |\n|---|---|---|\n"


def count(report: Path) -> list[dict[str, Any]]:
    """A row for each test function with the marker `failure` in a report of pytest."""
    rows: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        properties = {each.get("name"): each.get("value") for each in case.iter("property")}
        if "failure" not in properties or case.find("skipped") is not None:
            continue
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
        row = rows.setdefault(test, {"failure": properties["failure"], "test": test, "inputs": 0})
        row["inputs"] += int(properties.get("inputs") or 1)
    return sorted(rows.values(), key=lambda row: (row["failure"], row["test"]))


def run() -> None:
    """Run the tests of failures, and write their counts."""
    import hypothesis
    import torch

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        tests = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if MARK in path.read_text(encoding="utf-8")]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "failure", "-o", "junit_family=legacy"]
        subprocess.run([*command, f"--junitxml={report}", *tests], cwd=ROOT, check=True)
        rows = count(report)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "hypothesis": hypothesis.__version__}
    COUNTS.parent.mkdir(parents=True, exist_ok=True)
    COUNTS.write_text(json.dumps({"versions": versions, "tests": rows}, indent=2) + "\n", encoding="utf-8")


def table() -> str:
    """A line for each failure: the tests that hold it, and the number of inputs of all of them."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    failures: dict[str, list[dict[str, Any]]] = {}
    for row in counts["tests"]:
        failures.setdefault(row["failure"], []).append(row)
    lines = []
    for failure, rows in failures.items():
        links = [f"[{row['test'].rpartition('::')[2]}](../{row['test'].partition('::')[0]})" for row in rows]
        lines.append(f"| {failure} | {', '.join(links)} | {sum(row['inputs'] for row in rows):,} |\n")
    versions = ", ".join(f"{name} {version}" for name, version in counts["versions"].items())
    source = COUNTS.relative_to(ROOT)
    return f"{HEAD}{''.join(lines)}\nCounted with {versions} ([{source}](../{source})).\n"


def main() -> int:
    """Write the table, or with --check compare it."""
    if "--run" in sys.argv[1:]:
        run()
    return write_regions([("docs/reliability.md", "failures", table)])


if __name__ == "__main__":
    sys.exit(main())
