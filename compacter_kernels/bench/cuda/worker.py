"""`python -m compacter_kernels.bench.cuda.worker RESULT`: one shape in a process of its own, settings on stdin.

A kernel that faults or hangs takes its process with it, and no other shape.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from compacter_kernels import machine
from compacter_kernels.bench.cuda import sweep
from compacter_kernels.bench.settings import Settings


def main() -> None:
    """Run the sweep; the table is complete on disk after each token count."""
    path, described = Path(sys.argv[1]), machine.describe()
    described["revision"] = described["revision"] or os.environ.get("REVISION")  # of a tree that is no git checkout

    def save(table: dict[str, Any]) -> None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"machine": described, **table}), encoding="utf-8")
        new.replace(path)

    sweep.run(Settings.from_json(sys.stdin.read()), save)


if __name__ == "__main__":
    main()
