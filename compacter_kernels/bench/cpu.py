"""The CPU timer: interleaved rounds, in a process with page faults and in one without.

The C library returns large blocks to the system when they are freed, so that every fresh output is
paid for again, page by page: 24,577 faults and 40 ms for 96 MB on one thread. That costs the copy,
torch and the kernels the same and hides their difference. Two variables, which the C library reads
when a process starts, keep freed memory in the process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from compacter_kernels.bench import timer, worker
from compacter_kernels.bench.providers import Provider, make_call
from compacter_kernels.bench.rounds import Timing, interleave, seconds_of
from compacter_kernels.bench.settings import Settings
from compacter_kernels.cases import Case
from compacter_kernels.machine import memory_bytes

VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
THRESHOLD = str(4 * 2**30)
BUFFERS = 12  # like x: the most that dense, forward and backward, and the gate need
MEMORY_SHARE = 0.8
COPY_BYTES = 256 * 2**20  # of each of the two buffers: more than any cache
SGEMM_SIZE = 1024


def environment(page_faults: str, threads: int | None) -> dict[str, str]:
    """Return the environment of a process that measures with page faults "removed" or "kept"."""
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if page_faults == "removed":
        variables |= dict.fromkeys(VARIABLES, THRESHOLD)
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    return variables


def tables(settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """Yield the tables so far after each measuring process; ChildProcessError where one fails."""
    done: list[dict[str, Any]] = []
    how = {"removed": f"with {' = '.join(VARIABLES)} = {THRESHOLD}", "kept": f"without {' and '.join(VARIABLES)}"}
    for kind in settings.page_faults:
        print(f"page faults {kind}: a process {how[kind]}", file=sys.stderr)
        table, failure = worker.measure(settings, environment(kind, settings.threads))
        if failure is not None:
            raise ChildProcessError(failure)
        done.append({"page_faults": kind, **table})
        yield done


class Timer(timer.Timer):
    """Times the calls of one cell, and a float32 product of two matrices of SGEMM_SIZE rows."""

    def __init__(self, cell: timer.Cell, dtype: torch.dtype) -> None:
        super().__init__(cell)
        self.case = Case.of(cell.shape, cell.tokens, dtype=dtype).inputs()

    @staticmethod
    def describe() -> dict[str, Any]:
        """Return the rates; the sweep fills in the median of `sgemm`."""
        rate = timer.copy_bandwidth(COPY_BYTES, "cpu", seconds_of)
        return {"rates": {"copy_gb_per_s": rate / 1e9, "sgemm_gflops": None}}

    @staticmethod
    def too_large(cell: timer.Cell, dtype: torch.dtype) -> str | None:
        """Return why the cell does not fit into memory, or None."""
        need, free = BUFFERS * cell.tokens * cell.shape.k * max(4, dtype.itemsize), memory_bytes()
        return None if free is None else timer.shortage(need, free, MEMORY_SHARE)

    def prepare(self, provider: Provider, direction: str) -> Timing:
        """Make a call, and call it once."""
        timing = Timing(make_call(provider, self.case, direction))
        timing.call()
        return timing

    def measure(self, rounds: int | None, seconds: float) -> None:
        """Time all calls and the matrix product in interleaved rounds."""
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(SGEMM_SIZE, SGEMM_SIZE, generator=generator) for _ in range(2))
        out = torch.empty_like(a)
        sgemm, threads = Timing(lambda: torch.mm(a, b, out=out)), torch.get_num_threads()
        interleave([*self.timings.values(), sgemm], rounds, seconds, threads, os.cpu_count() or threads)
        self.sgemm = 2 * SGEMM_SIZE**3 / sgemm.quantiles()[1]
