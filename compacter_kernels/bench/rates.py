"""The machine's own rates: what a large copy moves and what a large matrix product computes, as torch does them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

SGEMM_SIZE = 1024
COPY_BYTES = 256 * 2**20  # of each of the two buffers: beyond any cache
COPY_REPEATS = 15


def sgemm() -> Callable[[], Tensor]:
    """A float32 product of two SGEMM_SIZE x SGEMM_SIZE matrices, into a buffer that is there already."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SGEMM_SIZE, SGEMM_SIZE, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def sgemm_flops() -> int:
    """Operations of one `sgemm()` call."""
    return 2 * SGEMM_SIZE**3


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy between two buffers that are in memory already; the median."""
    source, target = (torch.ones(COPY_BYTES // 4) for _ in range(2))
    seconds = []
    for _ in range(COPY_REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / statistics.median(seconds)
