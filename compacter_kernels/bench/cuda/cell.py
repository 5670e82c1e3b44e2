"""One shape and token count: every provider is checked, its memory read, its graphs captured; then all are timed."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from compacter_kernels.accuracy import Case, Oracle
from compacter_kernels.bench import cost
from compacter_kernels.bench.cuda.calls import make_call
from compacter_kernels.bench.cuda.device import l2_bytes
from compacter_kernels.bench.cuda.gate import GATE_ELEMENTS, judge
from compacter_kernels.bench.cuda.inputs import L2_MULTIPLE, MAX_COPIES, copies_needed, first_tokens, make_cases
from compacter_kernels.bench.cuda.timers import Flush, Replay, Train, estimate
from compacter_kernels.bench.providers import Provider
from compacter_kernels.bench.rows import Cell
from compacter_kernels.bench.saved import saved_bytes
from compacter_kernels.bench.settings import MAX_ROUNDS, MIN_ROUNDS

REPLAY_SECONDS = 2e-3  # of the device, at least, where the buffers allow it
CAPTURE_SECONDS = 0.1  # of the host, at most, where that leaves the buffers cold


@dataclass
class Row:
    """A provider in one direction: what times it, its samples in seconds, and what else is known of it."""

    provider: Provider
    direction: str
    replay: Replay
    train: Train
    known: dict[str, Any]
    cold: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """One sample of each kind."""
        self.cold.append(self.replay.sample())
        eager, host = self.train.sample()
        self.eager.append(eager)
        self.host.append(host)


class Bench(NamedTuple):
    """What all rows of a cell share."""

    cell: Cell
    cases: list[Case]
    flush: Flush
    pool: object


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call takes at once, beyond what there was before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _calls_in_graph(bench: Bench, direction: str, seconds: float) -> int:
    """A multiple of the copies that are cold, long enough to time; fewer, each once, where capture would take long."""
    needed = copies_needed(bench.cell, bench.cases[0].x.dtype, direction, l2_bytes())
    if needed > len(bench.cases):
        return max(16, min(len(bench.cases), int(CAPTURE_SECONDS / seconds)))
    return needed * max(1, round(REPLAY_SECONDS / seconds / needed))


def _row(bench: Bench, provider: Provider, direction: str, known: dict[str, Any]) -> Row:
    call = make_call(provider, bench.cases[0], direction)
    seconds = estimate(call)
    known = {**known, "peak_bytes": peak_bytes(call)}
    count = _calls_in_graph(bench, direction, seconds)
    needed = copies_needed(bench.cell, bench.cases[0].x.dtype, direction, l2_bytes())
    distinct = min(count, needed, len(bench.cases))
    calls = [make_call(provider, case, direction) for case in bench.cases[:distinct]]
    replay = Replay([calls[i % distinct] for i in range(count)], distinct, bench.flush, bench.pool)
    return Row(provider, direction, replay, Train(call, seconds), known)


def first_line(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def prepare(bench: Bench, providers: Iterator[Provider]) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows to time, and which providers are absent and why."""
    rows: list[Row] = []
    absent: list[dict[str, Any]] = []
    case = bench.cases[0]
    oracle = Oracle(first_tokens(case, max(1, GATE_ELEMENTS // bench.cell.shape.k)))
    for provider in providers:
        missing = {"cell": str(bench.cell), "provider": provider.name, "wrong": False}
        try:
            verdict = judge(provider, oracle)
            if verdict.wrong is not None:
                reason = f"failed the correctness gate: {verdict.wrong}"
                absent.append({**missing, "wrong": True, "reason": reason})
                continue
            both = cost.BOTH in provider.directions and provider.checked
            known = {
                "saved_bytes": saved_bytes(provider.bind, case) if both else None,
                "error_over_limit": verdict.worst,
                "checked_tokens": verdict.tokens,
            }
            rows += [_row(bench, provider, direction, known) for direction in provider.directions]
        except Exception as error:  # a compiler that fails, memory: the report says so, the others go on
            absent.append({**missing, "reason": first_line(error)})
            print(f"{bench.cell} {provider.name}: {first_line(error)}", file=sys.stderr)
            torch.cuda.synchronize()  # raises where the device itself is lost: then nothing can go on
    return rows, absent


def measure(cell: Cell, providers: Iterator[Provider], dtype: torch.dtype, rounds: int | None, seconds: float) -> Any:
    """The timed rows of a cell and its absent providers."""
    needed = copies_needed(cell, dtype, cost.FORWARD, l2_bytes())
    cases = make_cases(cell, dtype, min(MAX_COPIES, needed))
    bench = Bench(cell, cases, Flush(L2_MULTIPLE * l2_bytes()), torch.cuda.graph_pool_handle())
    rows, absent = prepare(bench, providers)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(rounds or MAX_ROUNDS):
            if rounds is None and turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            first = turn % max(1, len(rows))
            for row in rows[first:] + rows[:first]:
                row.sample()
    finally:
        gc.enable()
    return rows, absent
