"""The row of partial gradients that each program writes from its sums; reduce.py adds the rows.

A row holds left1, right2, bias2, rule1, right1, bias1, rule2 and left2, each laid out like its
parameter. A rule appears r times, once for each rank index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.tiles import factor, factor_pointers, merge, product, rule_at


@triton.jit
def store_factor(TO, d, u, c, K: tl.constexpr, side: tl.constexpr, LEFT: tl.constexpr):
    """Store d at (u, c), broadcast, as a factor: left (n, K, r) or right (n, r, K)."""
    tl.store(factor_pointers(TO, u, c, K, side, LEFT), d, mask=(u < K) & (c < side.C))


@triton.jit
def sum_dz(d, NI: tl.constexpr):
    """Sum [BK, m NI] = x^T dz_operand to [BK, NI]. Of m = 4 columns, two repeat the others."""
    if d.shape[1] == 4 * NI:
        d = tl.where(tl.arange(0, d.shape[1])[None, :] % 2 == 0, d, 0.0)
    return merge(d, NI)


@triton.jit
def store_out_side(row, d, u, scale, P: tl.constexpr):
    """Store scale * g^T v_operand, [BK, m NI]: even columns add up to dt2, column 1 is db2."""
    M: tl.constexpr = d.shape[1] // P.OUT.NI
    o = tl.arange(0, d.shape[1])[None, :]
    c = tl.arange(0, P.OUT.NI)[None, :]
    d_t2 = merge(tl.where(o % 2 == 0, d, 0.0), P.OUT.NI)
    store_factor(row + P.OFFSETS.T2, d_t2 * scale, u[:, None], c, P.OUT.K, P.OUT, False)
    if P.OPTIONS.HAS_BIAS:
        d_b2 = merge(tl.where(o % M == 1, d, 0.0), P.OUT.NI)
        m = (u < P.OUT.K)[:, None] & (c < P.OUT.N)
        tl.store(row + P.OFFSETS.B2 + c * P.OUT.K + u[:, None], d_b2 * scale, mask=m)


@triton.jit
def store_dense(row, d, d_b1, d_b2, b, part, u, c, scale, P: tl.constexpr):
    """Store the gradients of a dense up, [u, c], and of both biases. b, part: the block of u, c."""
    store_factor(row + P.OFFSETS.T2, d * scale, u[:, None], c[None, :], P.OUT.K, P.OUT, False)
    if P.OPTIONS.HAS_BIAS and part == 0:
        tl.store(row + P.OFFSETS.B2 + u, d_b2 * scale, mask=u < P.OUT.K)
    if b == 0:
        tl.store(row + P.OFFSETS.B1 + c, d_b1, mask=c < P.IN.C)


@triton.jit
def store_rule(TO, d, c, outer, inner, side: tl.constexpr, LEFT: tl.constexpr):
    """Store d at (c, outer, inner), broadcast, as r rules (n, n, n). LEFT: (c, inner, outer)."""
    if LEFT:
        o_rule = inner * side.N + outer
    else:
        o_rule = outer * side.M + inner
    o_rule += (c % side.R) * side.RULE + (c // side.R) * (side.N * side.M)
    tl.store(TO + o_rule, d, mask=(c < side.C) & (outer < side.N) & (inner < side.M))


@triton.jit
def store_folded(D_RULE, D_FACTOR, b, d, A, W, side: tl.constexpr, P: tl.constexpr, LEFT: tl.constexpr):
    """Store block b of dC, [NP * NI, EB], as gradients of the rule and copy b of the factor's.

    down: dA_i[p,q] = sum_v dC[(p,i), (q,v)] t_i[v],  dt_i[v] = sum_{p,q} dC[(p,i), (q,v)] A_i[p,q]
    up (LEFT) has (q,i), (p,v) and s instead.
    """
    D_FACTOR += b * (side.C * side.D)
    if side.NP * side.E == P.DP:
        Q: tl.constexpr = P.EB // side.E  # chunks of the bottleneck in a block
        outer = tl.arange(0, side.NP)[:, None, None]
        c = tl.arange(0, side.NI)
        inner = b * Q + tl.arange(0, Q)[None, None, :]
        v = tl.arange(0, side.E)
        d = tl.reshape(d, (side.NP, side.NI, Q, side.E))
        w = factor(W, v[None, :], c[:, None], side.D, side, LEFT)
        a = rule_at(A, c[None, :, None], outer, inner, side, LEFT)
        store_rule(D_RULE, tl.sum(d * w[None, :, None, :], 3), c[None, :, None], outer, inner, side, LEFT)
        d_factor = tl.sum(tl.sum(d * a[:, :, :, None], 2), 0)
    else:
        # e is one axis here, so products with one-hot matrices sum over a part of it.
        NQ: tl.constexpr = side.NP if side.NP > 16 else 16
        MIDDLE: tl.constexpr = P.PRECISION.MIDDLE
        j = tl.arange(0, side.NP * side.NI)[:, None]
        e = tl.arange(0, P.DP)
        inner = tl.arange(0, NQ)[None, :]
        v = tl.arange(0, P.DP)
        w = factor(W, (e % side.E)[None, :], j % side.NI, side.D, side, LEFT)
        a = rule_at(A, j % side.NI, j // side.NI, (e // side.E)[None, :], side, LEFT)
        d_rule = product(d * w, ((e // side.E)[:, None] == inner).to(tl.float32), MIDDLE)
        d_factor = product(d * a, ((e % side.E)[:, None] == v[None, :]).to(tl.float32), MIDDLE)
        store_rule(D_RULE, d_rule, j % side.NI, j // side.NI, inner, side, LEFT)
        d_factor = tl.sum(tl.reshape(d_factor, (side.NP, side.NI, P.DP)), 0)
        c = tl.arange(0, side.NI)
    store_factor(D_FACTOR, d_factor, v[None, :], c[:, None], side.D, side, LEFT)


@triton.jit
def store_folded_sums(row, b, sums, A1, T1, A2, S2, P: tl.constexpr):
    """Store the sums of block b of a folded bottleneck: dC1, dC2, db1."""
    store_folded(row + P.OFFSETS.A1, row + P.OFFSETS.T1, b, sums[0], A1, T1, P.IN, P, False)
    store_folded(row + P.OFFSETS.A2, row + P.OFFSETS.S2, b, sums[1], A2, S2, P.OUT, P, True)
    e = b * P.EB + tl.arange(0, P.EB)
    m = (e // P.IN.E < P.IN.N) & (e % P.IN.E < P.IN.D)
    tl.store(row + P.OFFSETS.B1 + e // P.IN.E * P.IN.D + e % P.IN.E, tl.sum(sums[2], 0), mask=m)


@triton.jit
def store_rule_sum(row, d, P: tl.constexpr):
    """Store the sum of one projection: the gradient of its rule, folded or by columns."""
    if P.FOLD:
        j = tl.arange(0, P.IN.NP * P.IN.NI)[:, None]
        k = tl.arange(0, P.OUT.NP * P.OUT.NI)[None, :]
        c, p, q = j % P.IN.NI, j // P.IN.NI, k // P.OUT.NI
        m = (p < P.IN.N) & (q < P.OUT.N) & (c < P.IN.C) & (k % P.OUT.NI == c)
        o_rule = c % P.IN.R * P.IN.RULE + c // P.IN.R * (P.IN.N * P.OUT.N) + p * P.OUT.N + q
        tl.store(row + P.OFFSETS.A1 + o_rule, d, mask=m)
    else:
        c = tl.arange(0, P.IN.NI)[:, None, None]
        p = tl.arange(0, P.IN.NP)[None, :, None]
        store_rule(row + P.OFFSETS.A1, d, c, p, tl.arange(0, P.OUT.NP)[None, None, :], P.IN, False)


@triton.jit
def store_held_sums(row, sums, A1, T1, A2, S2, P: tl.constexpr):
    """Store the sums of `held_backward`."""
    if P.ACTIVATION is None:
        store_rule_sum(row, sums[0], P)
    else:
        for b in tl.static_range(P.DP // P.EB):
            store_folded_sums(row, b, (sums[3 * b], sums[3 * b + 1], sums[3 * b + 2]), A1, T1, A2, S2, P)


@triton.jit
def store_unfolded_sums(row, sums, P: tl.constexpr):
    """Store the unfolded sums of one side: dA1, dt1 and db1, or dA2 and ds2."""
    v = tl.arange(0, P.DP)
    d_factor = tl.sum(sums[1], 0)
    if P.OPTIONS.IN_SIDE:
        c = tl.arange(0, P.IN.NI)
        p = tl.arange(0, P.IN.NP)
        store_rule(row + P.OFFSETS.A1, sums[0], c[:, None, None], p[None, :, None], p[None, None, :], P.IN, False)
        store_factor(row + P.OFFSETS.T1, d_factor, v[None, :], c[:, None], P.IN.D, P.IN, False)
        m = (p < P.IN.N)[:, None] & (v < P.IN.D)[None, :]
        tl.store(row + P.OFFSETS.B1 + p[:, None] * P.IN.D + v[None, :], sums[2], mask=m)
    else:
        c = tl.arange(0, P.OUT.NI)
        p = tl.arange(0, P.OUT.NP)
        store_rule(row + P.OFFSETS.A2, sums[0], c[:, None, None], p[None, :, None], p[None, None, :], P.OUT, False)
        store_factor(row + P.OFFSETS.S2, d_factor, v[None, :], c[:, None], P.OUT.D, P.OUT, True)
