"""Tables with page faults and without, each in a process of its own.

The C library gives large blocks back to the system as they are freed, so that every fresh output is paid for again,
page by page: 24,577 faults and 40 ms for 96 MB on one thread. That hits copy, torch and the kernels alike and hides
their difference. Two variables keep freed memory in the process; it reads them at its start, hence the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compacter_kernels.bench.settings import Settings

VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
THRESHOLD = str(4 * 2**30)


def environment(page_faults: str, threads: int | None) -> dict[str, str]:
    """The environment of the process that measures with page faults "removed" or "kept"."""
    found = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if page_faults == "removed":
        found |= dict.fromkeys(VARIABLES, THRESHOLD)
    if threads is not None:
        found |= {"OMP_NUM_THREADS": str(threads)}
    return found


def measure(settings: Settings, page_faults: str) -> dict[str, Any]:
    """The table of one such process; ChildProcessError where it fails."""
    if page_faults == "removed":
        print(f"page faults removed: a process with {' = '.join(VARIABLES)} = {THRESHOLD}", file=sys.stderr)
    else:
        print(f"page faults kept: a process without {' and '.join(VARIABLES)}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        done = subprocess.run(
            [sys.executable, "-m", "compacter_kernels.bench.worker", str(path)],
            input=settings.to_json(),
            text=True,
            env=environment(page_faults, settings.threads),
            check=False,
        )
        if done.returncode:
            raise ChildProcessError(
                f"the measuring process ended with exit code {done.returncode}; its message is above"
            )
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {"page_faults": page_faults, **table}
