"""The sweep over shapes and token counts in this process: gate, then time."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from compacter_kernels.accuracy import Case, Oracle, random_case
from compacter_kernels.bench import cost, rates
from compacter_kernels.bench.measure import Timing, interleave
from compacter_kernels.bench.providers import COMPILED, Provider, missing, providers, timed
from compacter_kernels.bench.rows import Cell, Timings, derive
from compacter_kernels.bench.saved import saved_bytes
from compacter_kernels.bench.settings import Settings
from compacter_kernels.machine import memory_bytes
from compacter_kernels.options import DTYPES

GATE_ELEMENTS = 2**25  # of x: above, the gate checks as many tokens as have these, since its float64 copies take memory
BUFFERS = 12  # like x: what dense, forward and backward, and the gate need at their widest
MEMORY_SHARE = 0.8


def too_large(cell: Cell, itemsize: int) -> str | None:
    """Why the cell does not fit into memory, or None."""
    need, free = BUFFERS * cell.tokens * cell.shape.k * max(4, itemsize), memory_bytes()
    if free is None or need <= MEMORY_SHARE * free:
        return None
    return f"skipped: needs about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def gate(provider: Provider, oracle: Oracle) -> str | None:
    """What is wrong with the provider's results, or None; RuntimeError where it cannot run at all."""
    deviations = oracle.check(
        lambda case: provider.bind(case)(), gradients=cost.BOTH in provider.directions, impl=provider.name
    )
    wrong = [str(deviation) for deviation in deviations if not deviation.holds]
    return "; ".join(wrong) or None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


class Prepared(NamedTuple):
    """A cell before timing: the calls that passed the gate, what is known of their providers, who is absent and why."""

    timings: Timings
    known: dict[str, dict[str, Any]]
    absent: list[dict[str, Any]]


def prepare(cell: Cell, case: Case, chosen: list[Provider], checked: Case) -> Prepared:
    """Gate every provider on `checked`, and make its calls on `case`."""
    found = Prepared({}, {}, [])
    oracle = Oracle(checked)
    for provider in chosen:
        absent = {"cell": str(cell), "provider": provider.name, "wrong": False}
        try:
            wrong = gate(provider, oracle) if provider.checked else None
            if wrong is not None:
                found.absent.append({**absent, "wrong": True, "reason": f"failed the correctness gate: {wrong}"})
                continue
            timings = {direction: Timing(timed(provider, case, direction)) for direction in provider.directions}
            for timing in timings.values():
                timing.call()
            saved = saved_bytes(provider.bind, case) if provider.checked and cost.BOTH in timings else None
        except Exception as error:  # a compiler that is not there, memory: the row says so, the others go on
            found.absent.append({**absent, "reason": _first_line(error)})
            continue
        found.timings.update({(provider.name, direction): timing for direction, timing in timings.items()})
        tokens = checked.x.shape[0] if provider.checked else None
        found.known[provider.name] = {"saved_bytes": saved, "checked_tokens": tokens}
    return found


def measure_cell(
    cell: Cell, settings: Settings, chosen: list[Provider]
) -> tuple[list[dict[str, Any]], Prepared, float]:
    """The rows of a cell, what was prepared for it, and the sgemm rate of its rounds, operations per second."""
    dtype, threads = DTYPES[settings.dtype], torch.get_num_threads()
    if any(provider.name == COMPILED for provider in chosen):
        torch.compiler.reset()  # it specialises for each cell
    case = random_case(cell.shape, cell.tokens, dtype=dtype)
    gated = min(cell.tokens, max(1, GATE_ELEMENTS // cell.shape.k))
    checked = case if gated == cell.tokens else random_case(cell.shape, gated, dtype=dtype)
    prepared = prepare(cell, case, chosen, checked)
    sgemm = Timing(rates.sgemm())
    timings = [*prepared.timings.values(), sgemm]
    interleave(timings, settings.rounds, settings.seconds, threads, os.cpu_count() or threads)
    rate = rates.sgemm_flops() / sgemm.quantiles()[1]
    rows = [{**row, **prepared.known[row["provider"]]} for row in derive(cell, dtype.itemsize, prepared.timings, rate)]
    return rows, prepared, rate


def run(settings: Settings) -> dict[str, Any]:
    """The table of this process: rates, rows, and which rows are absent and why."""
    wanted = settings.providers
    chosen = [p for p in providers().values() if wanted is None or p.name in ("copy", *wanted)]
    absent: list[dict[str, Any]] = [{"provider": n, "reason": why, "wrong": False} for n, why in missing().items()]
    rows, sgemm_rates = [], []
    bandwidth = rates.copy_bandwidth()
    for cell in progress([Cell(*pair) for pair in itertools.product(settings.shapes, settings.tokens)]):
        reason = too_large(cell, DTYPES[settings.dtype].itemsize)
        if reason is not None:
            absent.append({"cell": str(cell), "provider": "all", "reason": reason, "wrong": False})
            continue
        found, prepared, rate = measure_cell(cell, settings, chosen)
        rows += found
        absent += prepared.absent
        sgemm_rates.append(rate)
    sgemm = statistics.median(sgemm_rates) / 1e9 if sgemm_rates else None
    return {"rates": {"copy_gb_per_s": bandwidth / 1e9, "sgemm_gflops": sgemm}, "rows": rows, "absent": absent}


def progress(cells: list[Cell]) -> Iterator[Cell]:
    """The cells, with a bar on a terminal's stderr where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from cells
        return
    tqdm.monitor_interval = 0  # its thread would disturb the timing
    with tqdm(cells, unit="cell", disable=not sys.stderr.isatty()) as bar:
        for cell in bar:
            bar.set_description(str(cell))
            yield cell
