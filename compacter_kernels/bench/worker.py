"""`python -m compacter_kernels.bench.worker RESULT`: one table in a process of its own, by the settings on stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from compacter_kernels import machine
from compacter_kernels.bench import sweep
from compacter_kernels.bench.settings import Settings


def main() -> None:
    """Run the sweep and write the table as JSON."""
    settings = Settings.from_json(sys.stdin.read())
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    table = {"machine": machine.describe(), **sweep.run(settings)}
    Path(sys.argv[1]).write_text(json.dumps(table), encoding="utf-8")


if __name__ == "__main__":
    main()
