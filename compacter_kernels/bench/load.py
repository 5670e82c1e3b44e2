"""Whether other load disturbed a measurement: what the operating system says of the time that went by.

Three witnesses. Involuntary context switches: other processes took a core from one of our threads. Stolen time: another
virtual machine did. And the processor time that the machine spent beyond ours: fewer cores were free than our threads
need. The first tells within a sample of a millisecond; the others count in ticks of 10 ms and are asked once a WINDOW.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

SWITCHES_PER_SECOND = 125  # two busy threads on two idle cores were seen to have 50 to 105, beside another process 215
SPARE_CORES = 0.1
WINDOW = 0.1  # seconds
TICK = 1 / os.sysconf("SC_CLK_TCK")


def involuntary_switches() -> int:
    """Involuntary context switches of all threads of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def page_faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def preempted(switches: int, seconds: float) -> bool:
    """Whether that many involuntary switches are more than an idle machine makes."""
    return switches > 1 + SWITCHES_PER_SECOND * seconds


class Moment(NamedTuple):
    """Clocks, in seconds: the wall's, ours, the whole machine's busy time and its stolen time (0 where not known)."""

    wall: float
    own: float
    busy: float
    stolen: float

    @classmethod
    def now(cls) -> Moment:
        """The clocks of this moment."""
        busy = stolen = 0.0
        try:
            with Path("/proc/stat").open(encoding="ascii") as file:
                user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
            busy, stolen = (user + nice + system + irq + softirq) * TICK, steal * TICK
        except (OSError, ValueError):
            pass
        return cls(time.perf_counter(), time.process_time(), busy, stolen)

    def crowded(self, later: Moment, threads: int, cores: int) -> bool:
        """Whether between the two moments fewer cores than `threads` were left to us."""
        wall = later.wall - self.wall
        others = max(0.0, later.busy - self.busy - (later.own - self.own)) + (later.stolen - self.stolen)
        return others - 2 * TICK > (max(0, cores - threads) + SPARE_CORES) * wall
