"""The operations and bytes of one adapter call, by the model of the fused kernel at rank 1."""

from __future__ import annotations

from compacter_kernels.cases import Shape

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
PASSES = {FORWARD: 2, BOTH: 5}  # forward reads x and writes out; backward reads x and the gradient and writes dx


def flops(shape: Shape, tokens: int, direction: str) -> int:
    """Return 4kn + 4dn + 4n^3 operations a token; backward adds 10kn + 12dn + 12n^3."""
    k, d, n = shape
    forward = 4 * k * n + 4 * d * n + 4 * n**3
    backward = 10 * k * n + 12 * d * n + 12 * n**3
    return tokens * (forward if direction == FORWARD else forward + backward)


def traffic(shape: Shape, tokens: int, direction: str, itemsize: int) -> int:
    """Return the bytes of the passes over (T, k), with elements of `itemsize` bytes."""
    return PASSES[direction] * tokens * shape.k * itemsize
