"""The measuring process: `python -m compacter_kernels.bench.worker RESULT`, settings on stdin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from compacter_kernels import machine
from compacter_kernels.bench.settings import Settings

COMMAND = (sys.executable, "-u", "-m", "compacter_kernels.bench.worker")


def measure(settings: Settings, environment: dict[str, str] | None = None) -> tuple[dict[str, Any], str | None]:
    """Return the table of one process, and why the process failed, or None.

    A process that dies, or is stopped after `settings.limit` seconds, leaves what it wrote.
    """
    failure, given, limit = None, settings.to_json(), settings.limit or None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        path.write_text('{"rows": [], "absent": []}', encoding="utf-8")
        try:
            command = [*COMMAND, str(path)]
            done = subprocess.run(command, input=given, text=True, env=environment, check=False, timeout=limit)
            if done.returncode:
                failure = f"the measuring process ended with exit code {done.returncode}; its message is above"
        except subprocess.TimeoutExpired:
            failure = f"stopped after {settings.limit:.0f} s; give --limit more, or look for a kernel that hangs"
        return json.loads(path.read_text(encoding="utf-8")), failure


def main() -> None:
    """Run the sweep; after each cell the table on disk is complete."""
    from compacter_kernels.bench import sweep  # which imports this module

    settings, path = Settings.from_json(sys.stdin.read()), Path(sys.argv[1])
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    described = machine.describe()
    described["revision"] = described["revision"] or os.environ.get("REVISION")  # of a tree without git

    def save(table: dict[str, Any]) -> None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"machine": described, **table}), encoding="utf-8")
        new.replace(path)

    sweep.run(settings, save)


if __name__ == "__main__":
    main()
