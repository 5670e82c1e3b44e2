"""Interleaved timing on the CPU: every round samples each call once, in rotating order.

Samples that other load disturbed are repeated, until each call has enough undisturbed ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from compacter_kernels.bench import load, timer
from compacter_kernels.bench.settings import MAX_ROUNDS, MIN_ROUNDS

MIN_SAMPLE = 1e-3  # seconds; a faster call is repeated within a sample
WARM_TIME = 10e-3  # seconds of untimed calls before a sample, which bring the call's data into the caches
WARM_CALLS = 8  # at most; after other data had filled the caches, six calls were seen to get faster
MAX_REPEATS = 3  # at most this many times the samples that were asked for are taken


def seconds_of(call: Callable[[], object], loops: int = 1) -> float:
    """Return the seconds of so many calls, one after the other."""
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return time.perf_counter() - start


@dataclass
class Timing:
    """One call, with its undisturbed and its disturbed samples in seconds per call."""

    call: Callable[[], object]
    estimate: float = 0.0
    loops: int = 1
    samples: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    faults: int = 0

    def calibrate(self) -> None:
        """Warm up, and find out how many calls make a sample."""
        self.call()
        self.estimate = seconds_of(self.call)
        if self.warm_ups:
            self.estimate = min(self.estimate, seconds_of(self.call), seconds_of(self.call))
        self.loops = max(1, round(MIN_SAMPLE / self.estimate))

    @property
    def warm_ups(self) -> int:
        """The number of untimed calls before a sample; none for a long call."""
        return min(WARM_CALLS, round(WARM_TIME / self.estimate))

    def sample(self) -> tuple[float, bool]:
        """Return seconds per call, and whether another process took a core meanwhile."""
        seconds_of(self.call, self.warm_ups)
        faults, switches = load.page_faults(), load.involuntary_switches()
        seconds = seconds_of(self.call, self.loops)
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
        taken = len(self.samples) + len(self.disturbed)
        return {
            "samples": len(self.samples),
            "repeated": len(self.disturbed),
            "quiet": self.quiet,
            "calls_per_sample": self.loops,
            "page_faults_per_call": self.faults / (taken * self.loops),
        }


def interleave(timings: Sequence[Timing], rounds: int | None, seconds: float, threads: int, cores: int) -> None:
    """Take `rounds` undisturbed samples of each, or as many as fit into `seconds`.

    threads: the cores that a call needs, of the `cores` of the machine.
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
            first = (window * together + turn) % len(pending)
            taken += [(timing, *timing.sample()) for timing in pending[first:] + pending[:first]]
        crowded = before.crowded(load.Moment.now(), threads, cores)
        for timing, sample, disturbed in taken:
            (timing.disturbed if disturbed or crowded else timing.samples).append(sample)
