"""The rows of a timed cell: medians, and their ratios to the copies, to dense and to sgemm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compacter_kernels.bench import cost
from compacter_kernels.bench.columns import ROW
from compacter_kernels.bench.timer import Timer


def derive(timer: Timer[Any], known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one row for each timing, with the columns of the device.

    known: the columns of each provider that the timer does not measure.
    """
    x, cell = timer.case.x, timer.cell
    medians = {key: timing.quantiles()[1] for key, timing in timer.timings.items()}
    for (name, direction), timing in timer.timings.items():
        low, median, high = timing.quantiles()
        computes = name != "copy"
        rate = cost.flops(cell.shape, cell.tokens, direction) / median
        clone = medians.get(("copy", cost.FORWARD))
        copy, dense = medians.get(("copy", direction)), medians.get(("dense", direction))
        row = {
            **cell.shape._asdict(),
            "tokens": cell.tokens,
            "provider": name,
            "direction": direction,
            "ms": median * 1e3,
            "ms_q20": low * 1e3,
            "ms_q80": high * 1e3,
            "over_clone": clone and median / clone,
            "over_equal_copy": copy and median / copy,
            "fraction_of_copy": copy and copy / median,
            "dense_over_this": dense and dense / median if computes else None,
            "model_gb_per_s": cost.traffic(cell.shape, cell.tokens, direction, x.itemsize) / median / 1e9,
            "model_gflops": rate / 1e9 if computes else None,
            "share_of_sgemm": rate / timer.sgemm if computes and timer.sgemm else None,
            **timing.columns(),
            **known[name],
        }
        yield {column: row[column] for column in ROW[x.device.type]}
