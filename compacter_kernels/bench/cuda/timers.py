"""Two clocks for one call: the device's, cold, over a CUDA graph; and the host's, over a train of eager calls.

Cold: a graph holds the call on many copies of its inputs one after the other, which together with the outputs are
several times the L2, and keeps the outputs of each, so that no call finds its data in the cache. Where a graph would
need more copies than are kept, it holds each once only. Before a replay a large buffer is read, which leaves nothing
of an earlier one in the L2 and nothing to write back, and the device sleeps while the host launches the graph.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], object]
LEAD_CYCLES = 400_000  # some 0.2 ms, in which the host launches the graph
TRAIN_SECONDS, MIN_TRAIN, MAX_TRAIN = 10e-3, 3, 50


class Flush:
    """A buffer of several times the L2, to read."""

    def __init__(self, size: int) -> None:
        self.buffer = torch.zeros(size // 4, device="cuda")
        self.sum = torch.zeros((), device="cuda")

    def run(self) -> None:
        """Read it all; nothing else is in the L2 afterwards."""
        torch.sum(self.buffer, 0, out=self.sum)


def estimate(call: Call) -> float:
    """Seconds of one eager call, host and device, after it was warmed up."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Replay:
    """A CUDA graph of calls, of which each `distinct` in a row have buffers of their own.

    `sample()`: seconds of the device per call.
    """

    def __init__(self, calls: Sequence[Call], distinct: int, flush: Flush, pool: Any) -> None:
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
        kept.clear()  # graphs that share a pool run one after the other, and nobody reads these
        self.graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> float:
        """Seconds per call of one cold replay."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.run()
        torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        self.graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / self.count


class Train:
    """Eager calls back to back. `sample()`: seconds per call until the device is done, and until the host is."""

    def __init__(self, call: Call, expected: float) -> None:
        self.call = call
        self.count = max(MIN_TRAIN, min(MAX_TRAIN, int(TRAIN_SECONDS / expected)))

    def sample(self) -> tuple[float, float]:
        """One train."""
        call = self.call
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.count):
            call()
        issued = time.perf_counter()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.count, (issued - start) / self.count
