"""The wide side of a tile: its rows, their column blocks, and their contraction with a factor."""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.tiles import dot, factor, merge, wide_split


@triton.jit
def block(b, BK: tl.constexpr):
    """The columns of block b."""
    return b * BK + tl.arange(0, BK)


@triton.jit
def rows(tile, T, width, side: tl.constexpr, P: tl.constexpr):
    """The rows (token, p) of a tile: p, offset of the tile (int64), offsets in it, mask.

    T: the number of tokens, or with P.ROUTED the tokens of one adapter (see `gathered`).
    """
    r = tl.arange(0, P.BT * side.NP)
    token = r // side.NP
    p = r % side.NP
    if P.ROUTED:
        row, m = gathered(tile * P.BT + token, T)
        return p, tl.full((), 0, tl.int64), row * (side.N * width) + p * width, m & (p < side.N)
    else:
        first = tl.full((), P.BT * side.N * width, tl.int64) * tile
        return p, first, token * (side.N * width) + p * width, (token < T - tile * P.BT) & (p < side.N)


@triton.jit
def gathered(token, T):
    """The rows of x (int64) of an adapter's tokens, and which tokens exist.

    T: its number of tokens, its first position in the order of all tokens, and ORDER, the groups of
    `per` neighbouring rows in this order (bank.py).
    """
    count, first, ORDER, per = T
    m = token < count
    position = first + token
    group = tl.load(ORDER + position // per, mask=m, other=0).to(tl.int32)
    return (group * per + position % per).to(tl.int64), m


@triton.jit
def count(T, P: tl.constexpr):
    """The number of tokens of `rows`."""
    if P.ROUTED:
        return T[0]
    else:
        return T


@triton.jit
def load_blocks(tile, X, T, side: tl.constexpr, P: tl.constexpr):
    """All column blocks of a tile, each [BT * NP, BK], as a tuple."""
    xs = ()
    _, first, o_x, m_x = rows(tile, T, side.K, side, P)
    for b in tl.static_range((side.K + P.BK - 1) // P.BK):
        u = block(b, P.BK)
        m = m_x[:, None]
        if side.K % P.BK:
            m &= (u < side.K)[None, :]
        xs = xs + (tl.load(X + first + (o_x[:, None] + u[None, :]), mask=m, other=0.0),)
    return xs


@triton.jit
def contract(xs, weights, side: tl.constexpr, P: tl.constexpr):
    """sum_u x[(t, p), u] w[u, c] over the blocks of `load_blocks`: [BT * NP, NI] float32."""
    z = tl.zeros((P.BT * side.NP, weights[0].shape[1]), tl.float32)
    for b in tl.static_range((side.K + P.BK - 1) // P.BK):
        z = dot(xs[b].to(P.PRECISION.LP), weights[b], z, P.PRECISION.WIDE)
    return merge(z, side.NI)


@triton.jit
def stream(tile, X, T, W, scale, side: tl.constexpr, P: tl.constexpr, LEFT: tl.constexpr):
    """sum_u x[(t, p), u] scale w_c[u] for long rows, in a loop over blocks of x and of W."""
    LP: tl.constexpr = P.PRECISION.LP
    SPLIT: tl.constexpr = P.PRECISION.SPLIT
    _, first, o_x, m_x = rows(tile, T, side.K, side, P)
    c = tl.arange(0, side.NI)
    z = tl.zeros((P.BT * side.NP, (4 if side.NI == 4 else 2) * side.NI if SPLIT else side.NI), tl.float32)
    for b in tl.range(0, (side.K + P.BK - 1) // P.BK, num_stages=P.STAGES):
        u = block(b, P.BK)
        m = m_x[:, None] & (u < side.K)[None, :]
        x = tl.load(X + first + (o_x[:, None] + u[None, :]), mask=m, other=0.0)
        w = factor(W, u[:, None], c[None, :], side.K, side, LEFT) * scale
        z = dot(x.to(LP), wide_split(w, LP, SPLIT), z, P.PRECISION.WIDE)
    return merge(z, side.NI)
