"""The sweep over shapes and token counts: check every provider, then time those that passed."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compacter_kernels.accuracy import Oracle
from compacter_kernels.bench import cpu, cuda, peers
from compacter_kernels.bench.gate import first_tokens, judge
from compacter_kernels.bench.providers import Provider, missing, providers, saved_bytes
from compacter_kernels.bench.report import ROW
from compacter_kernels.bench.settings import Settings
from compacter_kernels.bench.timer import Cell, absent
from compacter_kernels.options import DTYPES

COMPILE_SHARE = 0.5  # of the limit: no provider is compiled later
SWEEP_SHARE = 0.9  # of the limit: no cell is begun later
Row = dict[str, Any]
Timer = cpu.Timer | cuda.Timer


def _prepare(timer: Timer, chosen: list[Provider], until: float, out: list[Row]) -> dict[str, Row]:
    """Make the timings of every provider that passes the gate; the others go `out`, with reasons.

    Returns the columns that the timer does not measure, by provider. After the time `until` no
    provider is compiled.
    """
    known: dict[str, Row] = {}
    oracle = Oracle(first_tokens(timer.case))
    for provider in chosen:
        name, cell = provider.name, timer.cell
        if provider.compiled and time.monotonic() > until:
            out.append(absent(name, "not compiled, no time was left; give --limit more", cell))
            continue
        try:
            wrong, worst, tokens = judge(provider, oracle)
            if wrong is not None:
                out.append(absent(name, f"failed the correctness gate: {wrong}", cell, wrong=True))
                continue
            saved = saved_bytes(provider, timer.case)
            timer.timings |= {(name, each): timer.prepare(provider, each) for each in provider.directions}
        except Exception as error:  # no compiler or no memory, for example; the other providers go on
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            out.append(absent(name, reason, cell))
            print(f"{cell} {name}: {reason}", file=sys.stderr)
            if timer.case.x.is_cuda:
                torch.cuda.synchronize()  # raises where the device is lost, and ends the process
            continue
        known[name] = {"saved_bytes": saved, "error_over_limit": worst, "checked_tokens": tokens}
        if provider.method != "Compacter":
            known[name] |= dict.fromkeys(("model_gflops", "share_of_sgemm"))  # the model is that of the fused kernel
    return known


def run(settings: Settings, save: Callable[[Row], None] = lambda table: None) -> Row:
    """Return the table: rates, rows, absent rows with reasons; `save` gets it after each cell."""
    start, limit = time.monotonic(), settings.limit or math.inf
    device, dtype, wanted = settings.device, DTYPES[settings.dtype], settings.providers
    timer_class: type[Timer] = cpu.Timer if device == "cpu" else cuda.Timer
    known_providers = providers(device, dtype) | (peers.providers(dtype) if settings.peers else {})
    chosen = [p for p in known_providers.values() if wanted is None or p.name in ("copy", *wanted)]
    without_all = missing(device) | (peers.missing(device) if settings.peers else {})
    out = [absent(name, reason) for name, reason in without_all.items()]
    compiled_shapes = settings.shapes if device == "cpu" else settings.compiled_shapes
    why = "compiled for the shapes of --compiled-shapes only, to save time"
    without = [shape for shape in settings.shapes if shape not in compiled_shapes]
    out += [absent(p.name, why, shape) for shape in without for p in chosen if p.compiled]
    table: Row = {**timer_class.describe(), "rows": [], "absent": out}
    if settings.peers:
        table["peers"] = peers.describe()
    sgemm: list[float] = []
    for cell in progress([Cell(*pair) for pair in itertools.product(settings.shapes, settings.tokens)]):
        reason = timer_class.too_large(cell, dtype)
        if reason is None and table["rows"] and time.monotonic() - start > SWEEP_SHARE * limit:
            reason = "skipped: no time was left; give --limit more"
        if reason is not None:
            out.append(absent("all", reason, cell))
            continue
        here = [p for p in chosen if not p.compiled or cell.shape in compiled_shapes]
        if device == "cpu" and any(p.compiled for p in here):
            torch.compiler.reset()  # each cell compiles its own
        timer = timer_class(cell, dtype)
        known = _prepare(timer, here, start + COMPILE_SHARE * limit, out)
        timer.measure(settings.rounds, settings.seconds)
        table["rows"] += ({name: row[name] for name in ROW[device]} for row in timer.rows(known))
        if timer.sgemm is not None:
            sgemm.append(timer.sgemm)
            table["rates"]["sgemm_gflops"] = statistics.median(sgemm) / 1e9
        del timer  # with its inputs and graphs, before the next cell needs memory
        save(table)
    save(table)
    return table


def progress(cells: list[Cell]) -> Iterator[Cell]:
    """Yield the cells, with a bar on a terminal's stderr where tqdm is installed."""
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
