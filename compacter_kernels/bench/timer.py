"""What the two timers have in common: `cpu.Timer` and `cuda.Timer` time the calls of one cell."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from compacter_kernels.bench.providers import Provider
from compacter_kernels.cases import Inputs, Shape

T = TypeVar("T")  # the samples of one call, with quantiles() in seconds, and columns() that this device alone has


class Cell(NamedTuple):
    """One shape and token count of the sweep."""

    shape: Shape
    tokens: int

    def __str__(self) -> str:
        return f"{self.shape} T={self.tokens}"


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20 % quantile, the median and the 80 % quantile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return low, statistics.median(samples), high


class Timer(ABC, Generic[T]):
    """Made from a cell and a dtype, it makes the inputs of the cell, and times the calls on them.

    case: the inputs on which the providers are checked. sgemm: the operations per second of a
    float32 matrix product in the same rounds, on the CPU.
    """

    case: Inputs
    sgemm: float | None = None

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        self.cell, self.dtype = cell, dtype
        self.timings: dict[tuple[str, str], T] = {}

    @staticmethod
    @abstractmethod
    def describe() -> dict[str, Any]:
        """Return the facts of the device for the table, with its rates under "rates"."""

    @staticmethod
    @abstractmethod
    def too_large(cell: Cell, dtype: torch.dtype) -> str | None:
        """Return why the cell does not fit into memory, or None."""

    @abstractmethod
    def prepare(self, provider: Provider, direction: str) -> T:
        """Make a call and warm it up."""

    @abstractmethod
    def measure(self, rounds: int | None, seconds: float) -> None:
        """Take `rounds` samples of each call in turns, or as many as fit into `seconds`."""

    def add(self, provider: Provider) -> None:
        """Prepare all directions of a provider; where one fails, none is timed."""
        self.timings |= {(provider.name, each): self.prepare(provider, each) for each in provider.directions}
