"""How the tables of examples say what several seeds gave."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation; sign "+" also marks a mean that is not negative."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
