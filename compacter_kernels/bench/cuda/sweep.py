"""All token counts of one shape in this process, largest first; `save` gets the table after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compacter_kernels.bench.cuda import cell as cells, device
from compacter_kernels.bench.cuda.rows import derive
from compacter_kernels.bench.providers import Provider, missing, providers
from compacter_kernels.bench.rivals import rivals
from compacter_kernels.bench.rows import Cell
from compacter_kernels.bench.settings import Settings
from compacter_kernels.options import DTYPES

MAX_ELEMENTS = 2**29  # of x
BUFFERS = 24  # like x in float32: what dense needs forward and backward, and the gate
COMPILE_SHARE = 0.5  # of the time: no provider is compiled later
Absent = list[dict[str, Any]]


def all_providers(dtype: torch.dtype) -> dict[str, Provider]:
    """Every provider on a CUDA device by name."""
    found = list(providers("cuda").values())
    return {provider.name: provider for provider in (*found, *rivals(dtype))}


def too_large(cell: Cell) -> str | None:
    """Why the cell is left out, or None."""
    size = cell.tokens * cell.shape.k
    if size > MAX_ELEMENTS:
        return f"skipped: x has more than 2^{MAX_ELEMENTS.bit_length() - 1} numbers"
    free, _ = torch.cuda.mem_get_info()
    if BUFFERS * 4 * size > free:
        return f"skipped: needs about {BUFFERS * 4 * size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    return None


def _in_time(chosen: list[Provider], until: float, cell: Cell, absent: Absent) -> Iterator[Provider]:
    """The providers; without those to be compiled once that time has come."""
    for provider in chosen:
        if provider.compiled and time.monotonic() > until:
            reason = "not compiled, no time was left; give --limit more"
            absent.append({"cell": str(cell), "provider": provider.name, "reason": reason, "wrong": False})
        else:
            yield provider


def _chosen(settings: Settings, absent: Absent) -> list[Provider]:
    wanted = settings.providers
    found = [p for p in all_providers(DTYPES[settings.dtype]).values() if wanted is None or p.name in ("copy", *wanted)]
    (shape,) = settings.shapes
    if shape not in settings.compiled_shapes:
        for provider in found:
            if provider.compiled:
                reason = "compiled for the shapes of --compiled-shapes only, to save time"
                absent.append({"cell": str(shape), "provider": provider.name, "reason": reason, "wrong": False})
        found = [provider for provider in found if not provider.compiled]
    return found


def run(settings: Settings, save: Callable[[dict[str, Any]], None]) -> None:
    """The table of this process, for settings with one shape: rates, rows, and which rows are absent and why."""
    start, dtype = time.monotonic(), DTYPES[settings.dtype]
    absent: Absent = [{"provider": name, "reason": why, "wrong": False} for name, why in missing("cuda").items()]
    chosen = _chosen(settings, absent)
    rows: list[dict[str, Any]] = []
    table = {"device": device.describe(), "rates": {"copy_gb_per_s": device.copy_bandwidth() / 1e9}}
    for tokens in sorted(settings.tokens, reverse=True):
        cell = Cell(settings.shapes[0], tokens)
        reason = too_large(cell)
        if reason is None and rows and time.monotonic() - start > 0.9 * settings.limit:
            reason = "skipped: no time was left; give --limit more"
        if reason is not None:
            absent.append({"cell": str(cell), "provider": "all", "reason": reason, "wrong": False})
            continue
        in_time = _in_time(chosen, start + COMPILE_SHARE * settings.limit, cell, absent)
        timed, failed = cells.measure(cell, in_time, dtype, settings.rounds, settings.seconds)
        rows = [*derive(cell, dtype.itemsize, timed), *rows]
        absent += failed
        save({**table, "rows": rows, "absent": absent})
        del timed
        torch.cuda.empty_cache()
    save({**table, "rows": rows, "absent": absent})
