"""The forward kernel: x is read once, the output is written once, and between them a token is n^2 r numbers.

    Z[p, i] = sum_u x[p, u] s1_i[u]
    adapter:  V[q, i] = sum_p A1_i[p, q] Z[p, i],  y[q, v] = sum_i V[q, i] t1_i[v] + b1,  h = act(y),
              Z2[p, i] = sum_v h[p, v] s2_i[v],    V2[q, i] = sum_p A2_i[p, q] Z2[p, i]
    linear:   V2[q, i] = sum_p A1_i[p, q] Z[p, i]
    out[q, u] = residual[q, u] + scale (sum_i V2[q, i] t2_i[u] + b2[q, u])
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.middle import middle
from compacter_kernels.impl.triton.tiles import dot, factor, merge, product, split, t_operand, v_operand


@triton.jit
def rows(tile, T, BT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr):
    """For each row (token, p) of a tile: p, its offset in elements (int64), and whether it exists."""
    r = tl.arange(0, BT * NP)
    token = tile * BT + r // NP
    p = r % NP
    return p, token.to(tl.int64) * (N * K) + p * K, (token < T) & (p < N)


@triton.jit(do_not_specialize=["T"])
def forward(
    X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, scale, T,
    N1: tl.constexpr, R1: tl.constexpr, K1: tl.constexpr, D1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    NI1: tl.constexpr, NI2: tl.constexpr, NP1: tl.constexpr, NP2: tl.constexpr, DP: tl.constexpr,
    ACTIVATION: tl.constexpr, FOLD: tl.constexpr, KEEP: tl.constexpr,
    LP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, MIDDLE_PRECISION: tl.constexpr,
    BT: tl.constexpr, BK1: tl.constexpr, BK2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs walk over tiles of BT tokens. KEEP: the residual is x, which stays on chip between its two uses."""
    NB1: tl.constexpr = (K1 + BK1 - 1) // BK1
    NB2: tl.constexpr = (K2 + BK2 - 1) // BK2
    c1 = tl.arange(0, NI1)
    s1 = ()
    for b in tl.static_range(NB1):
        u = b * BK1 + tl.arange(0, BK1)
        s1 = s1 + (split(factor(S1, u[:, None], c1[None, :], K1, N1 * R1, R1, True), LP, SPLIT),)
    t2 = ()
    for b in tl.static_range(NB2):
        u = b * BK2 + tl.arange(0, BK2)
        t2 = t2 + (t_operand(T2, B2, scale, u, N2, N2 * R2, NI2, K2, LP),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        p1, o_x, m_x = rows(tile, T, BT, N1, NP1, K1)
        z = tl.zeros((BT * NP1, s1[0].shape[1]), tl.float32)
        kept = ()
        for b in tl.static_range(NB1):
            u = b * BK1 + tl.arange(0, BK1)
            x = tl.load(X + o_x[:, None] + u[None, :], mask=m_x[:, None] & (u < K1)[None, :], other=0.0)
            z = dot(x.to(LP), s1[b], z, PRECISION)
            if KEEP:
                kept = kept + (x,)
        v2 = middle(
            merge(z, NI1), A1, T1, B1, A2, S2,
            N1, R1, NI1, NP1, D1, E1, N2, R2, NI2, NP2, D2, E2, DP, ACTIVATION, FOLD, BT, MIDDLE_PRECISION,
        )  # fmt: skip
        p2, o_out, m_out = rows(tile, T, BT, N2, NP2, K2)
        v = v_operand(v2, p2, N2, LP)
        for b in tl.static_range(NB2):
            u = b * BK2 + tl.arange(0, BK2)
            m = m_out[:, None] & (u < K2)[None, :]
            o = product(v, t2[b], PRECISION)
            if KEEP:
                o += kept[b].to(tl.float32)
            elif RESIDUAL is not None:
                o += tl.load(RESIDUAL + o_out[:, None] + u[None, :], mask=m, other=0.0).to(tl.float32)
            tl.store(OUT + o_out[:, None] + u[None, :], o.to(OUT.dtype.element_ty), mask=m)
