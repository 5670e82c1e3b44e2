"""The wide side of a tile: its rows, their column blocks, and the contraction of both with a factor."""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.tiles import dot, factor, merge, wide_split


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
def load_blocks(tile, X, T, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """All column blocks of a tile, each [BT * NP, BK], as a tuple."""
    xs = ()
    _, o_x, m_x = rows(tile, T, BT, N, NP, K)
    for b in tl.static_range((K + BK - 1) // BK):
        u = block(b, BK)
        xs = xs + (tl.load(X + o_x[:, None] + u[None, :], mask=m_x[:, None] & (u < K)[None, :], other=0.0),)
    return xs


@triton.jit
def contract(xs, weights, NI: tl.constexpr, BLOCKS: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr):
    """sum_u x[(t, p), u] w[u, c] over the blocks of `load_blocks`: [BT * NP, NI] float32."""
    z = tl.zeros((xs[0].shape[0], weights[0].shape[1]), tl.float32)
    for b in tl.static_range(BLOCKS):
        z = dot(xs[b].to(LP), weights[b], z, PRECISION)
    return merge(z, NI)


@triton.jit
def stream(
    tile, X, T, W, scale, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, R: tl.constexpr, NI: tl.constexpr,
    LEFT: tl.constexpr, LP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same of a row too long to be held, sum_u x[(t, p), u] scale w_c[u]: a loop that reads the factor too."""
    _, o_x, m_x = rows(tile, T, BT, N, NP, K)
    c = tl.arange(0, NI)
    z = tl.zeros((BT * NP, (4 if NI == 4 else 2) * NI if SPLIT else NI), tl.float32)
    for b in tl.range(0, (K + BK - 1) // BK, num_stages=STAGES):
        u = block(b, BK)
        x = tl.load(X + o_x[:, None] + u[None, :], mask=m_x[:, None] & (u < K)[None, :], other=0.0)
        w = factor(W, u[:, None], c[None, :], K, N * R, R, LEFT) * scale
        z = dot(x.to(LP), wide_split(w, LP, SPLIT), z, PRECISION)
    return merge(z, NI)
