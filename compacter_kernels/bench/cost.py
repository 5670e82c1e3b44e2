"""What one adapter call must compute and move, by the model of the fused kernel at rank 1."""

from __future__ import annotations

from compacter_kernels.accuracy import Shape

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
PASSES = {FORWARD: 2, BOTH: 5}  # forward reads x and writes out; backward reads x and the gradient and writes dx


def flops(shape: Shape, tokens: int, direction: str) -> int:
    """Forward 4kn + 4dn + 4n^3 a token; backward, which computes all but x again, 10kn + 12dn + 12n^3 more."""
    k, d, n = shape
    forward = 4 * k * n + 4 * d * n + 4 * n**3
    backward = 10 * k * n + 12 * d * n + 12 * n**3
    return tokens * (forward if direction == FORWARD else forward + backward)


def traffic(shape: Shape, tokens: int, direction: str, itemsize: int) -> int:
    """Bytes: the passes over (T, k), each element of `itemsize` bytes."""
    return PASSES[direction] * tokens * shape.k * itemsize
