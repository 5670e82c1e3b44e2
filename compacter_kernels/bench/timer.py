"""What the timers of the two devices share: the cell that is timed, quantiles, and the rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from compacter_kernels.bench import cost
from compacter_kernels.cases import Inputs, Shape

COPY_REPEATS = 20


class Cell(NamedTuple):
    """One shape and token count of the sweep."""

    shape: Shape
    tokens: int

    def __str__(self) -> str:
        return f"{self.shape} T={self.tokens}"


def absent(provider: str, reason: str, cell: object = None, wrong: bool = False) -> dict[str, Any]:
    """Return the entry of a provider that was not timed. wrong: it failed, and so does the run."""
    where = {} if cell is None else {"cell": str(cell)}
    return {**where, "provider": provider, "reason": reason, "wrong": wrong}


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20 % quantile, the median and the 80 % quantile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return low, statistics.median(samples), high


def rotated(items: list[Any], turn: int) -> list[Any]:
    """Return the items in the order of this turn. From turn to turn another one comes first."""
    first = turn % max(1, len(items))
    return items[first:] + items[:first]


def copy_bandwidth(size: int, device: str, seconds: Callable[[Callable[[], object]], float]) -> float:
    """Return the median bytes per second, read and written, of a copy; `seconds` times a call."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(COPY_REPEATS))


def shortage(need: int, free: int, share: float = 1.0) -> str | None:
    """Return why `need` bytes do not fit into this share of the free ones, or None."""
    if need <= share * free:
        return None
    return f"skipped: needs about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


class Timer:
    """Makes the inputs of one cell and times calls on them; `cpu.Timer` and `cuda.Timer` say how.

    case: the inputs on which the providers are checked. timings: by provider and direction; each
    has quantiles() in seconds, and columns() that this device alone has. sgemm: the operations per
    second of a float32 matrix product in the same rounds, on the CPU.
    """

    case: Inputs
    sgemm: float | None = None

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.timings: dict[tuple[str, str], Any] = {}

    def rows(self, known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield a row for each timing: medians, and their ratios to the copies, dense and sgemm.

        known: the columns of each provider that the timer does not measure.
        """
        shape, tokens = self.cell
        medians = {key: timing.quantiles()[1] for key, timing in self.timings.items()}
        clone = medians.get(("copy", cost.FORWARD))
        for (name, direction), timing in self.timings.items():
            low, median, high = timing.quantiles()
            computes = name != "copy"
            rate = cost.flops(shape, tokens, direction) / median
            copy, dense = medians.get(("copy", direction)), medians.get(("dense", direction))
            yield {
                **shape._asdict(),
                "tokens": tokens,
                "provider": name,
                "direction": direction,
                "ms": median * 1e3,
                "ms_q20": low * 1e3,
                "ms_q80": high * 1e3,
                "over_clone": clone and median / clone,
                "over_equal_copy": copy and median / copy,
                "fraction_of_copy": copy and copy / median,
                "dense_over_this": dense and dense / median if computes else None,
                "model_gb_per_s": cost.traffic(shape, tokens, direction, self.case.x.itemsize) / median / 1e9,
                "model_gflops": rate / 1e9 if computes else None,
                "share_of_sgemm": rate / self.sgemm if computes and self.sgemm else None,
                **timing.columns(),
                **known[name],
            }
