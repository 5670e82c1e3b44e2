"""`bench --device cuda`: a process for each shape, and the report on disk after each."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compacter_kernels.accuracy import Shape
from compacter_kernels.bench.cuda import report
from compacter_kernels.bench.settings import Settings

COMPILED_WEIGHT = 3  # a shape with compiled providers takes as long as so many without
SLACK = 1.5  # times its part of the time that is left is what one shape may take
WORKER = (sys.executable, "-u", "-m", "compacter_kernels.bench.cuda.worker")


def _allowance(settings: Settings, left: tuple[Shape, ...], seconds: float) -> float:
    """What the first of the shapes that are left may take of the seconds that are left."""
    weights = [COMPILED_WEIGHT if shape in settings.compiled_shapes else 1 for shape in left]
    return min(seconds, SLACK * seconds * weights[0] / sum(weights))


def measure(settings: Settings) -> dict[str, Any]:
    """The table of one shape, of which a process that died or hung may have left a part; "failed" says why."""
    with tempfile.TemporaryDirectory() as folder:
        path, failed = Path(folder) / "table.json", None
        try:
            command = [*WORKER, str(path)]
            done = subprocess.run(command, input=settings.to_json(), text=True, check=False, timeout=settings.limit)
            if done.returncode:
                failed = f"the measuring process ended with exit code {done.returncode}; its message is above"
        except subprocess.TimeoutExpired:
            failed = f"stopped after {settings.limit:.0f} s; give --limit more, or look for a kernel that hangs"
        table: dict[str, Any] = {"rows": [], "absent": []}
        if path.is_file():
            table = json.loads(path.read_text(encoding="utf-8"))
    if failed is not None:
        cell = {"cell": str(settings.shapes[0]), "provider": "some token counts", "reason": failed, "wrong": True}
        table["absent"].append(cell)
    return table


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Every shape; what is measured is in the folder before the next one starts."""
    deadline = time.monotonic() + settings.limit
    found: dict[str, Any] = {"settings": json.loads(settings.to_json()), "tables": []}
    merged: dict[str, Any] = {"rows": [], "absent": []}
    for index, shape in enumerate(settings.shapes):
        allowance = _allowance(settings, settings.shapes[index:], deadline - time.monotonic())
        if allowance <= 0:
            merged["absent"].append(
                {"cell": str(shape), "provider": "all", "reason": "no time was left; give --limit more", "wrong": False}
            )
            continue
        print(f"{shape}: at most {allowance:.0f} s", file=sys.stderr, flush=True)
        table = measure(dataclasses.replace(settings, shapes=(shape,), limit=allowance))
        merged = {**table, **merged, **{key: merged[key] + table[key] for key in ("rows", "absent")}}
        found["tables"] = [merged]
        report.write(found, folder)
    found["tables"] = [merged]
    return found
