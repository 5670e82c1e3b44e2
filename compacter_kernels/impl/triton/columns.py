"""The wide side of a tile: its rows, their column blocks, and the contraction of both with a factor."""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.tiles import dot


@triton.jit
def block(b, BK: tl.constexpr):
    """The columns of block b."""
    return b * BK + tl.arange(0, BK)


@triton.jit
def rows(tile, T, BT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr):
    """For each row (token, p) of a tile: p, its offset in elements (int64), and whether it exists."""
    r = tl.arange(0, BT * NP)
    token = tile * BT + r // NP
    p = r % NP
    return p, token.to(tl.int64) * (N * K) + p * K, (token < T) & (p < N)


@triton.jit
def load_blocks(
    tile, X, T, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """All column blocks of a tile, each [BT * NP, BK], as a tuple; empty where nothing is kept."""
    xs = ()
    if KEEP:
        p, o_x, m_x = rows(tile, T, BT, N, NP, K)
        for b in tl.static_range((K + BK - 1) // BK):
            u = block(b, BK)
            xs = xs + (tl.load(X + o_x[:, None] + u[None, :], mask=m_x[:, None] & (u < K)[None, :], other=0.0),)
    return xs


@triton.jit
def contract(
    tile, xs, X, T, operands, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, LP: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """sum_u x[(t, p), u] operand[u, c] over all column blocks: [BT * NP, m NI] float32."""
    z = tl.zeros((BT * NP, operands[0].shape[1]), tl.float32)
    if KEEP:
        for b in tl.static_range((K + BK - 1) // BK):
            z = dot(xs[b].to(LP), operands[b], z, PRECISION)
    else:
        p, o_x, m_x = rows(tile, T, BT, N, NP, K)
        for b in tl.static_range((K + BK - 1) // BK):
            u = block(b, BK)
            x = tl.load(X + o_x[:, None] + u[None, :], mask=m_x[:, None] & (u < K)[None, :], other=0.0)
            z = dot(x.to(LP), operands[b], z, PRECISION)
    return z
