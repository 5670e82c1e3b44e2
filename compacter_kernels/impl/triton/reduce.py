"""The second stage of backward, which sums the rows of partials in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.routes import rows_of


@triton.jit
def reduce_one(PART, OUT, block, rows, offset, SIZE, COPIES, ROW: tl.constexpr, BLOCK: tl.constexpr, BR: tl.constexpr):
    """OUT[o] = sum of PART[row, offset + copy * SIZE + o] over rows and copies, for one block."""
    o = block * BLOCK + tl.arange(0, BLOCK)
    i_row = tl.arange(0, BR)
    total = tl.zeros((BR, BLOCK), tl.float32)
    for copy in range(COPIES):
        for first in range(0, rows, BR):
            row = first + i_row
            p = PART + row.to(tl.int64)[:, None] * ROW + (offset + copy * SIZE + o)[None, :]
            total += tl.load(p, mask=(row < rows)[:, None] & (o < SIZE)[None, :], other=0.0)
    tl.store(OUT + o, tl.sum(total, 0).to(OUT.dtype.element_ty), mask=o < SIZE)


@triton.jit(do_not_specialize=["wide_rows", "rows"])
def reduce_rows(
    PART, G0, G1, G2, G3, G4, G5, G6, G7, wide_rows, rows,
    SIZES: tl.constexpr, COPIES: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Each program sums a block of a gradient; they are in the order of a row, unwanted ones None.

    The first three, the gradients of the wide sides, have `wide_rows` rows, the others `rows`.
    """
    grads = (G0, G1, G2, G3, G4, G5, G6, G7)
    block = tl.program_id(0)
    offset = 0
    for i in tl.static_range(8):
        if grads[i] is not None:
            blocks = (SIZES[i] + BLOCK - 1) // BLOCK
            if (block >= 0) & (block < blocks):
                count = wide_rows if i < 3 else rows
                reduce_one(PART, grads[i], block, count, offset, SIZES[i], COPIES[i], ROW, BLOCK, BR)
            block -= blocks
        offset += SIZES[i] * COPIES[i]


@triton.jit
def reduce_bank(
    PART, G0, G1, G2, G3, G4, G5, G6, G7, IN_TABLE, OUT_TABLE, TABLE,
    SIZES: tl.constexpr, COPIES: tl.constexpr, ROW: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`reduce_rows` for each adapter of a bank. A gradient has E times its size.

    The tables: of the launches that wrote the first gradient, the next two, and the others.
    """
    grads = (G0, G1, G2, G3, G4, G5, G6, G7)
    block, e = tl.program_id(0), tl.program_id(1)
    first, count = rows_of(e, IN_TABLE, E)
    offset = 0
    for i in tl.static_range(8):
        if i == 1:
            first, count = rows_of(e, OUT_TABLE, E)
        elif i == 3:
            first, count = rows_of(e, TABLE, E)
        if grads[i] is not None:
            blocks = (SIZES[i] + BLOCK - 1) // BLOCK
            if (block >= 0) & (block < blocks):
                rows = PART + first * ROW
                to = grads[i] + tl.full((), SIZES[i], tl.int64) * e
                reduce_one(rows, to, block, count, offset, SIZES[i], COPIES[i], ROW, BLOCK, BR)
            block -= blocks
        offset += SIZES[i] * COPIES[i]
