"""What the tables show of a timed cell."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from compacter_kernels.bench import cost
from compacter_kernels.bench.cuda.cell import Row
from compacter_kernels.bench.rows import Cell


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20 %, median and 80 %."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return low, statistics.median(samples), high


def derive(cell: Cell, itemsize: int, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """One row for each provider and direction, compared with the copies and with dense."""
    medians = {(row.provider.name, row.direction): statistics.median(row.cold) for row in rows}

    def over(seconds: float, provider: str, direction: str) -> float | None:
        other = medians.get((provider, direction))
        return None if other is None else seconds / other

    for row in rows:
        low, median, high = quantiles(row.cold)
        of_copy, of_dense = (over(median, name, row.direction) for name in ("copy", "dense"))
        yield {
            **cell.shape._asdict(),
            "tokens": cell.tokens,
            "provider": row.provider.name,
            "direction": row.direction,
            "ms": median * 1e3,
            "ms_q20": low * 1e3,
            "ms_q80": high * 1e3,
            "over_clone": over(median, "copy", cost.FORWARD),
            "over_equal_copy": of_copy,
            "fraction_of_copy": None if of_copy is None else 1 / of_copy,
            "dense_over_this": None if of_dense is None or not row.provider.checked else 1 / of_dense,
            "model_gb_per_s": cost.traffic(cell.shape, cell.tokens, row.direction, itemsize) / median / 1e9,
            "eager_us": statistics.median(row.eager) * 1e6,
            "host_us": statistics.median(row.host) * 1e6,
            "samples": len(row.cold),
            "calls_per_replay": row.replay.count,
            "buffers": row.replay.distinct,
            "calls_per_train": row.train.count,
            **row.known,
        }
