"""The two clocks of a call on a CUDA device: a replayed graph, and eager calls on the host.

The device's time is cold. A graph holds the call on many copies of its inputs, one after the other,
and keeps the outputs of each. Together they are several times as large as the L2 cache, so that no
call finds its data in it. Where a graph would need more copies than there are, it holds each copy
once. Before a replay a large buffer is read, which evicts everything from the L2 and leaves nothing
to write back. Then the device sleeps while the host launches the graph.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], object]
LEAD_CYCLES = 400_000  # about 0.2 ms, in which the host launches the graph
TRAIN_SECONDS, MIN_TRAIN, MAX_TRAIN = 10e-3, 3, 50
COPY_BYTES = 2**30  # of each of the two buffers: far more than the L2
COPY_REPEATS = 20


def estimate(call: Call) -> float:
    """Return the seconds of one eager call, host and device, after a warm-up."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Replay:
    """A CUDA graph of calls; every `distinct` calls in a row have separate buffers.

    flush: reads a buffer that is larger than the L2.
    """

    def __init__(self, calls: Sequence[Call], distinct: int, flush: Call, pool: Any) -> None:
        self.count, self.distinct, self.flush = len(calls), distinct, flush
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        kept: deque[object] = deque(maxlen=distinct)
        with torch.cuda.graph(self.graph, pool=pool):
            for call in calls:
                kept.append(call())
        kept.clear()  # graphs that share a pool run one after the other, and nobody reads their outputs
        self.graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> float:
        """Return the device's seconds per call of one cold replay."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        self.graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / self.count


class Train:
    """Eager calls, one directly after the other."""

    def __init__(self, call: Call, expected: float) -> None:
        self.call = call
        self.count = max(MIN_TRAIN, min(MAX_TRAIN, int(TRAIN_SECONDS / expected)))

    def sample(self) -> tuple[float, float]:
        """Return seconds per call until the device is done, and until the last call returned."""
        call = self.call
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.count):
            call()
        issued = time.perf_counter()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.count, (issued - start) / self.count


def peak_bytes(call: Call) -> int:
    """Return the most memory that a call takes at once, beyond the memory in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Return the bytes per second, read and written, of a copy of a large buffer; the median."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 8)
    source, target = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    seconds = []
    for _ in range(COPY_REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        seconds.append(float(start.elapsed_time(stop)) / 1e3)
    return 2 * size / statistics.median(seconds)
