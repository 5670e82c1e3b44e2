"""What the tables show of a timed cell: ratios to the copies, to dense and to the machine's sgemm rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from compacter_kernels.accuracy import Shape
from compacter_kernels.bench import cost
from compacter_kernels.bench.measure import Timing

Timings = dict[tuple[str, str], Timing]  # by provider and direction


class Cell(NamedTuple):
    """One shape and token count of the sweep."""

    shape: Shape
    tokens: int

    def __str__(self) -> str:
        return f"{self.shape} T={self.tokens}"


def _ratio(seconds: float, timings: Timings, key: tuple[str, str], inverse: bool = False) -> Any:
    if key not in timings:
        return None
    other = timings[key].quantiles()[1]
    return other / seconds if inverse else seconds / other


def derive(cell: Cell, itemsize: int, timings: Timings, sgemm: float) -> Iterator[dict[str, Any]]:
    """One row for each timing. sgemm: operations per second, measured in the same rounds."""
    for (name, direction), timing in timings.items():
        low, median, high = timing.quantiles()
        rate = cost.flops(cell.shape, cell.tokens, direction) / median
        computes = name != "copy"
        yield {
            **cell.shape._asdict(),
            "tokens": cell.tokens,
            "provider": name,
            "direction": direction,
            "ms": median * 1e3,
            "ms_q20": low * 1e3,
            "ms_q80": high * 1e3,
            "over_clone": _ratio(median, timings, ("copy", cost.FORWARD)),
            "over_equal_copy": _ratio(median, timings, ("copy", direction)),
            "dense_over_this": _ratio(median, timings, ("dense", direction), inverse=True) if computes else None,
            "model_gb_per_s": cost.traffic(cell.shape, cell.tokens, direction, itemsize) / median / 1e9,
            "model_gflops": rate / 1e9 if computes else None,
            "share_of_sgemm": rate / sgemm if computes else None,
            "samples": len(timing.samples),
            "repeated": len(timing.disturbed),
            "quiet": timing.quiet,
            "calls_per_sample": timing.loops,
            "page_faults_per_call": timing.faults / timing.calls,
        }
