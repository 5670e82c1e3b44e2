"""Calls in processes of their own, timed on request, so that several revisions can take turns."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compacter_kernels.bench.cpu import environment

SECONDS = 0.02  # of calls for one sample


class Server:
    """A process that runs `script --serve ARGS` on the package of that checkout."""

    def __init__(self, script: str, checkout: Path, threads: int, others: Mapping[str, str] | None = None) -> None:
        env = environment("removed", threads) | {"PYTHONPATH": str(checkout)} | dict(others or {})
        command = [sys.executable, str(Path(script).resolve()), "--serve", str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=env, cwd=checkout, text=True, **pipes)

    def ask(self, name: str) -> float:
        """The microseconds of one call of that name."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def serve(calls: Mapping[str, Callable[[], Any]], now: Callable[[], float] = time.perf_counter) -> None:
    """Answer each name on stdin with the microseconds of one call, nan without such a call.

    The first calls do not count.
    """
    counts: dict[str, int] = {}
    for line in sys.stdin:
        name = line.rstrip("\n")
        call = calls.get(name)
        if call is None:
            print("nan", flush=True)
            continue
        if name not in counts:
            call()
            start = now()
            call()
            counts[name] = max(1, int(SECONDS / max(now() - start, 1e-6)))
        start = now()
        for _ in range(counts[name]):
            call()
        print((now() - start) / counts[name] * 1e6, flush=True)
