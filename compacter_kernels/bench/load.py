"""Whether other load disturbed a measurement, by three counters of the operating system.

Involuntary context switches mean that other processes took a core from one of our threads. Stolen
time means that another virtual machine took one. Processor time of the machine beyond ours means
that fewer cores were free than our threads need. The first counter serves a sample of a
millisecond; the others count in ticks of 10 ms and are read once in a WINDOW.
"""

from __future__ import annotations

import os
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SWITCHES_PER_SECOND = 125  # of two threads on two idle cores 50 to 105 were seen, beside other load 215
SPARE_CORES = 0.1
WINDOW = 0.1  # seconds
TICK = 1 / os.sysconf("SC_CLK_TCK")


def involuntary_switches() -> int:
    """Return the involuntary context switches of all threads of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def page_faults() -> int:
    """Return the page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_resident_bytes() -> int:
    """Return the peak memory of this process; `ru_maxrss` would include that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def preempted(switches: int, seconds: float) -> bool:
    """Return whether that many involuntary switches are more than an idle machine makes."""
    return switches > 1 + SWITCHES_PER_SECOND * seconds


class Moment(NamedTuple):
    """Seconds of the wall clock, of our threads, of the busy machine, and stolen ones."""

    wall: float
    own: float
    busy: float
    stolen: float

    @classmethod
    def now(cls) -> Moment:
        """Read the clocks."""
        busy = stolen = 0.0
        with suppress(OSError, ValueError), Path("/proc/stat").open(encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
            busy, stolen = (user + nice + system + irq + softirq) * TICK, steal * TICK
        return cls(time.perf_counter(), time.process_time(), busy, stolen)

    def crowded(self, later: Moment, threads: int, cores: int) -> bool:
        """Return whether between the two moments fewer cores than `threads` were left to us."""
        wall = later.wall - self.wall
        others = max(0.0, later.busy - self.busy - (later.own - self.own)) + (later.stolen - self.stolen)
        return others - 2 * TICK > (max(0, cores - threads) + SPARE_CORES) * wall
