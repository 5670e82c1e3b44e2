"""The two clocks of a call on a CUDA device: a replayed graph, and eager calls on the host.

The device's time is cold. A graph holds the call on many copies of its inputs, one after the other,
and keeps the outputs of each. Together they are several times as large as the L2 cache, so that no
call finds its data in it. Where a graph would need more copies than there are, it holds each copy
once. Before a replay a large buffer is read, which evicts everything from the L2 and leaves nothing
to write back. Then the device sleeps while the host launches the graph.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], object]
LEAD_CYCLES = 400_000  # about 0.2 ms, in which the host launches the graph


def estimate(call: Call) -> tuple[float, int]:
    """Return the seconds of one eager call after a warm-up, host and device, and its peak memory.

    That is the most memory that the call takes at once, beyond the memory in use before it.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def device_seconds(call: Call) -> float:
    """Return the seconds that the device takes for one call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def train(call: Call, count: int) -> tuple[float, float]:
    """Return the seconds of an eager call in a train: until the device is done, until the host is.

    The calls follow directly one after the other, and the host is done when the last one returns.
    """
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count, (issued - start) / count


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
        self.flush()
        torch.cuda._sleep(LEAD_CYCLES)
        return device_seconds(self.graph.replay) / self.count
