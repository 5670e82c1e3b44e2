"""Where the rows of each adapter of a routed bank stand, and which tiles they make."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_of(e, ROUTE, groups, steps):
    """The first position in the ascending ROUTE (groups,) whose id is at least e: binary search."""
    low = tl.zeros(e.shape, tl.int64)
    high = low + groups
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        open_ = low < high
        less = tl.load(ROUTE + middle, mask=open_, other=0) < e
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["groups", "steps", "per", "n", "size", "most"])
def adapter_table(ROUTE, TABLE, groups, steps, per, n, size, most, E: tl.constexpr, PADDED: tl.constexpr):
    """TABLE [2, E + 1] of a launch: the first row of each adapter in their order, and program.

    A group has `per` rows, a row n parts, a tile `size` parts. An adapter has so many programs that
    each has at most the tiles that one of `most` programs has if all tiles are one adapter's.
    """
    e = tl.arange(0, PADDED)
    first = first_of(e, ROUTE, groups, steps) * per
    rows = first_of(e + 1, ROUTE, groups, steps) * per - first
    tiles = tl.where(e < E, (rows * n + size - 1) // size, 0)
    if E == 1:
        programs = tl.minimum(tiles, most)
    else:
        each = tl.maximum((tl.sum(tiles, 0) + most - 1) // most, 1)
        programs = (tiles + each - 1) // each
    tl.store(TABLE + e, first.to(tl.int32), mask=e <= E)
    tl.store(TABLE + (E + 1) + e, (tl.cumsum(programs, 0) - programs).to(tl.int32), mask=e <= E)


@triton.jit
def rows_of(e, TABLE, E: tl.constexpr):
    """The rows of partial sums of adapter e, one of each program: the first (int64), the number."""
    first = tl.load(TABLE + (E + 1) + e)
    return first.to(tl.int64), tl.load(TABLE + (E + 2) + e) - first
