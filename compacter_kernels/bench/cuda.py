"""The CUDA timer: cold replays of graphs for the device, trains of eager calls for the host."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compacter_kernels import machine
from compacter_kernels.bench import cost, timer, worker
from compacter_kernels.bench.graphs import Replay, Train, copy_bandwidth, estimate, peak_bytes
from compacter_kernels.bench.providers import Provider, make_call
from compacter_kernels.bench.settings import MAX_ROUNDS, MIN_ROUNDS, Settings
from compacter_kernels.bench.timer import Cell
from compacter_kernels.cases import Case, Inputs, Shape

L2_MULTIPLE = 3
MAX_COPIES = 256
MAX_ELEMENTS = 2**29  # of x
BUFFERS = 24  # like x in float32: the most that dense, forward and backward, and the gate need
REPLAY_SECONDS = 2e-3  # of the device, at least, where the buffers allow it
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
    """Yield the table so far after each shape.

    Each shape has its own process, so that a kernel that faults or hangs costs one shape.
    """
    deadline = time.monotonic() + settings.limit
    merged: dict[str, Any] = {"rows": [], "absent": []}
    tokens = tuple(sorted(settings.tokens, reverse=True))  # the largest first, while there is time
    for index, shape in enumerate(settings.shapes):
        limit = allowance(settings, settings.shapes[index:], deadline - time.monotonic())
        absent = {"cell": str(shape), "provider": "all", "wrong": False}
        if limit <= 0:
            merged["absent"].append({**absent, "reason": "no time was left; give --limit more"})
        else:
            print(f"{shape}: at most {limit:.0f} s", file=sys.stderr, flush=True)
            table, failure = worker.measure(replace(settings, shapes=(shape,), tokens=tokens, limit=limit))
            rows = merged["rows"] + sorted(table["rows"], key=lambda row: row["tokens"])
            merged = {**table, **merged, "rows": rows, "absent": merged["absent"] + table["absent"]}
            if failure is not None:
                absent |= {"provider": "some token counts", "wrong": True}
                merged["absent"].append({**absent, "reason": failure})
        yield [merged]


def copies_needed(cell: Cell, dtype: torch.dtype, direction: str, l2: int) -> int:
    """Return how many copies of all buffers of a call fill the L2 L2_MULTIPLE times; at least 2."""
    size = cost.traffic(cell.shape, cell.tokens, direction, dtype.itemsize)
    return max(2, -(-L2_MULTIPLE * l2 // size))


def make_cases(cell: Cell, dtype: torch.dtype, count: int) -> list[Inputs]:
    """Return cases with the same weights, and each with its own x and its own gradient."""
    base = Case.of(cell.shape, 1, dtype=dtype).inputs().map(lambda t: t.to("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(cell.tokens, cell.shape.k, generator=generator, device="cuda", dtype=dtype)

    cases = []
    for _ in range(count):
        x = normal()
        cases.append(base._replace(x=x, residual=x, grad=normal()))
    return cases


@dataclass
class Timing:
    """The two clocks of a provider in one direction, and their samples in seconds per call."""

    replay: Replay
    train: Train
    peak: int
    cold: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Take one sample of each kind."""
        self.cold.append(self.replay.sample())
        eager, host = self.train.sample()
        self.eager.append(eager)
        self.host.append(host)

    def quantiles(self) -> tuple[float, float, float]:
        """Return the quantiles of the cold samples."""
        return timer.quantiles(self.cold)

    def columns(self) -> dict[str, Any]:
        """Return the host's times, how the samples were taken, and the memory."""
        return {
            "eager_us": statistics.median(self.eager) * 1e6,
            "host_us": statistics.median(self.host) * 1e6,
            "samples": len(self.cold),
            "calls_per_replay": self.replay.count,
            "buffers": self.replay.distinct,
            "calls_per_train": self.train.count,
            "peak_bytes": self.peak,
        }


class Timer(timer.Timer[Timing]):
    """Times the calls of one cell on copies of its inputs."""

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        super().__init__(cell, dtype)
        l2 = machine.l2_bytes()
        self.needed = {each: copies_needed(cell, dtype, each, l2) for each in cost.DIRECTIONS}
        self.cases = make_cases(cell, dtype, min(MAX_COPIES, self.needed[cost.FORWARD]))
        self.case = self.cases[0]
        buffer, total = (torch.zeros(size, device="cuda") for size in (L2_MULTIPLE * l2 // 4, ()))
        self.flush, self.pool = lambda: torch.sum(buffer, 0, out=total), torch.cuda.graph_pool_handle()

    @staticmethod
    def describe() -> dict[str, Any]:
        """Return the device and its rate."""
        return {"device": machine.gpu(), "rates": {"copy_gb_per_s": copy_bandwidth() / 1e9}}

    @staticmethod
    def too_large(cell: Cell, dtype: torch.dtype) -> str | None:
        """Return why the cell is left out, or None."""
        torch.cuda.empty_cache()  # of the cell before
        size = cell.tokens * cell.shape.k
        need, (free, _) = BUFFERS * 4 * size, torch.cuda.mem_get_info()
        if size > MAX_ELEMENTS:
            return f"skipped: x has more than 2^{MAX_ELEMENTS.bit_length() - 1} numbers"
        if need > free:
            return f"skipped: needs about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        return None

    def prepare(self, provider: Provider, direction: str) -> Timing:
        """Capture a graph of calls on the copies.

        The graph is long enough to time, and has equally many calls on each of the needed copies.
        Where there are fewer copies than needed, it has one call on each, or on fewer where the
        capture would take long.
        """
        call = make_call(provider, self.case, direction, keep_out=True)
        seconds, needed, copies = estimate(call), self.needed[direction], len(self.cases)
        if needed > copies:
            count = max(16, min(copies, int(CAPTURE_SECONDS / seconds)))
        else:
            count = needed * max(1, round(REPLAY_SECONDS / seconds / needed))
        peak, distinct = peak_bytes(call), min(count, needed, copies)
        calls = [make_call(provider, case, direction, keep_out=True) for case in self.cases[:distinct]]
        replay = Replay([calls[i % distinct] for i in range(count)], distinct, self.flush, self.pool)
        return Timing(replay, Train(call, seconds), peak)

    def measure(self, rounds: int | None, seconds: float) -> None:
        """Take the samples in interleaved rounds, without the garbage collector."""
        timings = list(self.timings.values())
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            for turn in range(rounds or MAX_ROUNDS):
                if rounds is None and turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                    break
                first = turn % max(1, len(timings))
                for timing in timings[first:] + timings[:first]:
                    timing.sample()
        finally:
            gc.enable()
