"""The figures of the README are those of the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readme_states_the_committed_results() -> None:
    command = [sys.executable, "benchmarks/readme_table.py", "--check"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr or "run python benchmarks/readme_table.py"
