"""How far two variants of one calculation are apart: nothing is timed unless they agree."""

from torch import Tensor


def disagreement(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of two outcomes, relative to the largest entry."""
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-30)) for x, y in zip(a, b, strict=True))
