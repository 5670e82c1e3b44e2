"""The CUDA timer: cold replays of graphs for the device, trains of eager calls for the host.

The device's time is cold. A graph holds the call on many copies of its inputs, one after the other,
and keeps the outputs of each. Together they are several times as large as the L2 cache, so that no
call finds its data in it. Where a graph would need more copies than there are, it holds each copy
once. Before a replay a large buffer is read, which evicts everything from the L2 and leaves nothing
to write back. Then the device sleeps while the host launches the graph.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from compacter_kernels import machine
from compacter_kernels.bench import cost, timer, worker
from compacter_kernels.bench.providers import Provider, make_call
from compacter_kernels.bench.settings import MAX_ROUNDS, MIN_ROUNDS, Settings
from compacter_kernels.bench.timer import Cell, absent
from compacter_kernels.cases import Case, Inputs, Shape

Call = Callable[[], object]
LEAD_CYCLES = 400_000  # about 0.2 ms, in which the host launches the graph
L2_MULTIPLE = 3
MAX_COPIES = 256
MAX_ELEMENTS = 2**29  # of x
BUFFERS = 24  # like x in float32: the most that dense, forward and backward, and the gate need
REPLAY_SECONDS = 2e-3  # of the device, at least, where the buffers allow it
TRAIN_SECONDS, MIN_TRAIN, MAX_TRAIN = 10e-3, 3, 50  # of eager calls, one directly after the other
COPY_BYTES = 2**30  # of each of the two buffers: far more than the L2
CAPTURE_SECONDS = 0.1  # of the host, at most, where that leaves the buffers cold
COMPILED_WEIGHT = 3  # a shape with compiled providers takes as long as this many shapes without
SLACK = 1.5  # one shape may take this many times its share of the time that is left


def require() -> None:
    """Raise an error that says what to do where torch has no CUDA device."""
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        raise RuntimeError(f"--device cuda: torch {torch.__version__} is built without CUDA; install a build with it")
    advice = "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu"
    raise RuntimeError(f"--device cuda: torch finds no CUDA device; {advice}")


def allowance(settings: Settings, left: tuple[Shape, ...], seconds: float) -> float:
    """Return the seconds for the first of the remaining shapes, of the remaining seconds."""
    weights = [COMPILED_WEIGHT if shape in settings.compiled_shapes else 1 for shape in left]
    return min(seconds, SLACK * seconds * weights[0] / sum(weights))


def tables(settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """Yield the table after each shape. A shape has its own process, so a fault costs it alone."""
    deadline = time.monotonic() + settings.limit
    merged: dict[str, Any] = {"rows": [], "absent": []}
    tokens = tuple(sorted(settings.tokens, reverse=True))  # the largest first, while there is time
    for index, shape in enumerate(settings.shapes):
        limit = allowance(settings, settings.shapes[index:], deadline - time.monotonic())
        if limit <= 0:
            merged["absent"].append(absent("all", "no time was left; give --limit more", shape))
        else:
            print(f"{shape}: at most {limit:.0f} s", file=sys.stderr, flush=True)
            table, failure = worker.measure(replace(settings, shapes=(shape,), tokens=tokens, limit=limit))
            rows = merged["rows"] + sorted(table["rows"], key=lambda row: row["tokens"])
            merged = {**table, **merged, "rows": rows, "absent": merged["absent"] + table["absent"]}
            if failure is not None:
                merged["absent"].append(absent("some token counts", failure, shape, wrong=True))
        yield [merged]


def copies_needed(cell: Cell, dtype: torch.dtype, direction: str, l2: int) -> int:
    """Return how many copies of all buffers of a call fill the L2 L2_MULTIPLE times; at least 2."""
    size = cost.traffic(cell.shape, cell.tokens, direction, dtype.itemsize)
    return max(2, -(-L2_MULTIPLE * l2 // size))


def estimate(call: Call) -> tuple[float, int]:
    """Return the seconds of a warm eager call, host and device, and its peak memory in bytes."""
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


@dataclass
class Timing:
    """The two clocks of a provider in one direction: a graph of `calls`, and a train of eager ones.

    Every `distinct` calls of the graph in a row have separate buffers. flush: reads a buffer that
    is larger than the L2. train_calls: in a train, one directly after the other. peak: bytes.
    samples: seconds per call of the device in a cold replay, then in a train until the device is
    done, and until the host is.
    """

    calls: Sequence[Call]
    distinct: int
    train_calls: int
    peak: int
    flush: Call
    pool: Any
    samples: list[tuple[float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in self.calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.pool):
            kept = deque((call() for call in self.calls), maxlen=self.distinct)
        kept.clear()  # graphs that share a pool run one after the other, and nobody reads their outputs
        self.graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> None:
        """Take one sample of each kind."""
        self.flush()
        torch.cuda._sleep(LEAD_CYCLES)
        cold = device_seconds(self.graph.replay) / len(self.calls)
        call = self.calls[0]
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.train_calls):
            call()
        issued = time.perf_counter()
        torch.cuda.synchronize()
        eager, host = ((end - start) / self.train_calls for end in (time.perf_counter(), issued))
        self.samples.append((cold, eager, host))

    def quantiles(self) -> tuple[float, float, float]:
        """Return the quantiles of the cold samples."""
        return timer.quantiles([cold for cold, _, _ in self.samples])

    def columns(self) -> dict[str, Any]:
        """Return the host's times, how the samples were taken, and the memory."""
        _, eager, host = map(statistics.median, zip(*self.samples, strict=True))
        times = {"eager_us": eager * 1e6, "host_us": host * 1e6, "samples": len(self.samples)}
        counts = {"calls_per_replay": len(self.calls), "buffers": self.distinct, "calls_per_train": self.train_calls}
        return {**times, **counts, "peak_bytes": self.peak}


class Timer(timer.Timer):
    """Times the calls of one cell on copies of its inputs.

    cases: with the same weights, and each with its own x and its own gradient.
    """

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        super().__init__(cell)
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.needed = {each: copies_needed(cell, dtype, each, l2) for each in cost.DIRECTIONS}
        base = Case.of(cell.shape, 1, dtype=dtype).inputs().map(lambda t: t.to("cuda"))
        generator = torch.Generator("cuda").manual_seed(0)
        draw = partial(torch.randn, cell.tokens, cell.shape.k, generator=generator, device="cuda", dtype=dtype)
        copies = (draw() for _ in range(min(MAX_COPIES, self.needed[cost.FORWARD])))
        self.cases = [base._replace(x=x, residual=x, grad=draw()) for x in copies]
        self.case = self.cases[0]
        buffer, total = (torch.zeros(size, device="cuda") for size in (L2_MULTIPLE * l2 // 4, ()))
        self.flush, self.pool = lambda: torch.sum(buffer, 0, out=total), torch.cuda.graph_pool_handle()

    @staticmethod
    def describe() -> dict[str, Any]:
        """Return the device and its rate."""
        size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 8)
        rate = timer.copy_bandwidth(size, "cuda", device_seconds)
        return {"device": machine.gpu(), "rates": {"copy_gb_per_s": rate / 1e9}}

    @staticmethod
    def too_large(cell: Cell, dtype: torch.dtype) -> str | None:
        """Return why the cell is left out, or None."""
        torch.cuda.empty_cache()  # of the cell before
        size = cell.tokens * cell.shape.k
        if size > MAX_ELEMENTS:
            return f"skipped: x has more than 2^{MAX_ELEMENTS.bit_length() - 1} numbers"
        return timer.shortage(BUFFERS * 4 * size, torch.cuda.mem_get_info()[0])

    def prepare(self, provider: Provider, direction: str) -> Timing:
        """Capture the calls of a provider."""
        return self.capture(lambda case: make_call(provider, case, direction, keep_out=True), direction)

    def capture(self, bind: Callable[[Inputs], Call], direction: str) -> Timing:
        """Capture a graph of calls on the copies; bind makes the call on one copy.

        The graph is long enough to time, and has equally many calls on each of the needed copies.
        Where there are fewer copies than needed, it has one call on each, or on fewer where the
        capture would take long.
        """
        needed, copies = self.needed[direction], len(self.cases)
        seconds, peak = estimate(bind(self.case))
        if needed > copies:
            count = max(16, min(copies, int(CAPTURE_SECONDS / seconds)))
        else:
            count = needed * max(1, round(REPLAY_SECONDS / seconds / needed))
        distinct = min(count, needed, copies)
        once = [bind(case) for case in self.cases[:distinct]]
        calls = [once[i % distinct] for i in range(count)]
        train_calls = max(MIN_TRAIN, min(MAX_TRAIN, int(TRAIN_SECONDS / seconds)))
        return Timing(calls, distinct, train_calls, peak, self.flush, self.pool)

    def measure(self, rounds: int | None, seconds: float) -> None:
        """Take the samples in interleaved rounds, without the garbage collector."""
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            for turn in range(rounds or MAX_ROUNDS):
                if rounds is None and turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                    break
                for timing in timer.rotated(list(self.timings.values()), turn):
                    timing.sample()
        finally:
            gc.enable()
