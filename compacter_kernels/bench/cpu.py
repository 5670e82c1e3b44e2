"""The CPU timer: interleaved rounds, in a process with page faults and in one without.

The C library returns large blocks to the system when they are freed, so that every fresh output is
paid for again, page by page: 24,577 faults and 40 ms for 96 MB on one thread. That costs the copy,
torch and the kernels the same and hides their difference. Two variables, which the C library reads
when a process starts, keep freed memory in the process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compacter_kernels.bench import load, timer, worker
from compacter_kernels.bench.providers import Provider, make_call
from compacter_kernels.bench.settings import MAX_ROUNDS, MIN_ROUNDS, Settings
from compacter_kernels.cases import Case
from compacter_kernels.machine import memory_bytes

VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
THRESHOLD = str(4 * 2**30)
BUFFERS = 12  # like x: the most that dense, forward and backward, and the gate need
MEMORY_SHARE = 0.8
COPY_BYTES = 256 * 2**20  # of each of the two buffers: more than any cache
SGEMM_SIZE = 1024
MIN_SAMPLE = 1e-3  # seconds; a faster call is repeated within a sample
WARM_TIME = 10e-3  # seconds of untimed calls before a sample, which bring the call's data into the caches
WARM_CALLS = 8  # at most; after other data had filled the caches, six calls were seen to get faster
MAX_REPEATS = 3  # at most this many times the samples that were asked for are taken


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


def _seconds(call: Callable[[], object], loops: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return time.perf_counter() - start


@dataclass
class Timing:
    """One call, with its undisturbed and its disturbed samples in seconds per call.

    estimate: seconds of a call. warm_ups: untimed calls before a sample. loops: calls of a sample.
    """

    call: Callable[[], object]
    estimate: float = 0.0
    warm_ups: int = 0
    loops: int = 1
    samples: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    faults: int = 0

    def calibrate(self) -> None:
        """Warm up, and find out how many calls make a sample; a long call needs no warm-up."""
        self.call()
        self.estimate = _seconds(self.call)
        if round(WARM_TIME / self.estimate):
            self.estimate = min(self.estimate, _seconds(self.call), _seconds(self.call))
        self.warm_ups = min(WARM_CALLS, round(WARM_TIME / self.estimate))
        self.loops = max(1, round(MIN_SAMPLE / self.estimate))

    def sample(self) -> tuple[float, bool]:
        """Return seconds per call, and whether another process took a core meanwhile."""
        _seconds(self.call, self.warm_ups)
        faults, switches = load.page_faults(), load.involuntary_switches()
        seconds = _seconds(self.call, self.loops)
        disturbed = load.preempted(load.involuntary_switches() - switches, seconds)
        self.faults += load.page_faults() - faults
        return seconds / self.loops, disturbed

    @property
    def quiet(self) -> bool:
        """Whether enough samples were undisturbed to speak for the call."""
        return len(self.samples) >= MIN_ROUNDS or not self.disturbed

    def quantiles(self) -> tuple[float, float, float]:
        """Return the quantiles of the undisturbed samples; of all where those are too few."""
        return timer.quantiles(self.samples if self.quiet else self.samples + self.disturbed)

    def columns(self) -> dict[str, Any]:
        """Return how the samples were taken."""
        samples, repeated = len(self.samples), len(self.disturbed)
        per_call = self.faults / (self.loops * (samples + repeated))
        counts = {"samples": samples, "repeated": repeated, "quiet": self.quiet, "calls_per_sample": self.loops}
        return {**counts, "page_faults_per_call": per_call}


def interleave(timings: Sequence[Timing], rounds: int | None, seconds: float, threads: int, cores: int) -> None:
    """Take `rounds` undisturbed samples of each, or as many as fit into `seconds`.

    Every round samples each call once, in rotating order. Samples that other load disturbed are
    repeated. threads: the cores that a call needs, of the `cores` of the machine.
    """
    for timing in timings:
        timing.calibrate()
    one_round = sum(t.estimate * (t.warm_ups + t.loops) for t in timings)
    if rounds is None:
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round)))
    together = min(rounds, 1 + int(load.WINDOW / one_round))  # rounds in a window of the load meter
    for window in range(MAX_REPEATS * rounds // together):
        pending = [timing for timing in timings if len(timing.samples) < rounds]
        if not pending:
            return
        before, taken = load.Moment.now(), []
        for turn in range(together):
            for timing in timer.rotated(pending, window * together + turn):
                taken.append((timing, *timing.sample()))
        crowded = before.crowded(load.Moment.now(), threads, cores)
        for timing, sample, disturbed in taken:
            (timing.disturbed if disturbed or crowded else timing.samples).append(sample)


class Timer(timer.Timer):
    """Times the calls of one cell, and a float32 product of two matrices of SGEMM_SIZE rows."""

    def __init__(self, cell: timer.Cell, dtype: torch.dtype) -> None:
        super().__init__(cell)
        self.case = Case.of(cell.shape, cell.tokens, dtype=dtype).inputs()

    @staticmethod
    def describe() -> dict[str, Any]:
        """Return the rates; the sweep fills in the median of `sgemm`."""
        rate = timer.copy_bandwidth(COPY_BYTES, "cpu", _seconds)
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
