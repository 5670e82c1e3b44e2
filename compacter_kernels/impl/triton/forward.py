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

from compacter_kernels.impl.triton.columns import block, contract, load_blocks, rows, stream
from compacter_kernels.impl.triton.middle import middle, middle_weights
from compacter_kernels.impl.triton.tiles import factor, product, t_operand, v_operand, wide_split


@triton.jit
def forward_weights(
    A1, S1, T1, B1, A2, S2, T2, B2, scale,
    N1: tl.constexpr, R1: tl.constexpr, K1: tl.constexpr, D1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    NI1: tl.constexpr, NI2: tl.constexpr, NP1: tl.constexpr, NP2: tl.constexpr, DP: tl.constexpr,
    ACTIVATION: tl.constexpr, FOLD: tl.constexpr, LP: tl.constexpr, SPLIT: tl.constexpr,
    BK1: tl.constexpr, BK2: tl.constexpr,
):  # fmt: skip
    """The operands that all tiles share: s1 and t2 by column blocks, and those of the middle."""
    c1 = tl.arange(0, NI1)
    s1 = ()
    for b in tl.static_range((K1 + BK1 - 1) // BK1):
        s = factor(S1, block(b, BK1)[:, None], c1[None, :], K1, N1 * R1, R1, True)
        s1 = s1 + (wide_split(s, LP, SPLIT),)
    t2 = ()
    for b in tl.static_range((K2 + BK2 - 1) // BK2):
        t2 = t2 + (t_operand(T2, B2, scale, block(b, BK2), N2, N2 * R2, NI2, K2, LP),)
    mid = middle_weights(A1, T1, B1, A2, S2, N1, R1, NI1, NP1, D1, E1, N2, R2, NI2, NP2, D2, E2, DP, ACTIVATION, FOLD)
    return s1, t2, mid


@triton.jit
def forward_tile(
    tile, xs, weights, RESIDUAL, OUT, T,
    N1: tl.constexpr, K1: tl.constexpr, D1: tl.constexpr, E1: tl.constexpr,
    N2: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, E2: tl.constexpr,
    NI1: tl.constexpr, NI2: tl.constexpr, NP1: tl.constexpr, NP2: tl.constexpr, DP: tl.constexpr,
    ACTIVATION: tl.constexpr, FOLD: tl.constexpr, SAME: tl.constexpr, LP: tl.constexpr,
    PRECISION: tl.constexpr, MIDDLE_PRECISION: tl.constexpr,
    BT: tl.constexpr, BK1: tl.constexpr, BK2: tl.constexpr,
):  # fmt: skip
    """One tile; xs are its blocks of x, and SAME the residual too."""
    s1, t2, mid = weights
    z = contract(xs, s1, NI1, (K1 + BK1 - 1) // BK1, LP, PRECISION)
    v2 = middle(z, mid, N1, NI1, NP1, D1, E1, N2, NI2, NP2, D2, E2, DP, ACTIVATION, FOLD, BT, MIDDLE_PRECISION)
    p, o_out, m_out = rows(tile, T, BT, N2, NP2, K2)
    v = v_operand(v2, p, N2, LP)
    for b in tl.static_range((K2 + BK2 - 1) // BK2):
        u = block(b, BK2)
        m = m_out[:, None] & (u < K2)[None, :]
        o = product(v, t2[b], PRECISION)
        if SAME:
            o += xs[b].to(tl.float32)
        elif RESIDUAL is not None:
            o += tl.load(RESIDUAL + o_out[:, None] + u[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(OUT + o_out[:, None] + u[None, :], o.to(OUT.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T"])
def forward(
    X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, scale, T,
    N1: tl.constexpr, R1: tl.constexpr, K1: tl.constexpr, D1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    NI1: tl.constexpr, NI2: tl.constexpr, NP1: tl.constexpr, NP2: tl.constexpr, DP: tl.constexpr,
    ACTIVATION: tl.constexpr, FOLD: tl.constexpr, SAME: tl.constexpr,
    LP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, MIDDLE_PRECISION: tl.constexpr,
    BT: tl.constexpr, BK1: tl.constexpr, BK2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """SAME: the residual is x, which stays on chip between its two uses.

    Programs walk over tiles of BT tokens; with STAGES = 0 each has one tile, whose x is asked for before the weights.
    """
    if STAGES == 0:
        tile = tl.program_id(0)
        xs = load_blocks(tile, X, T, N1, NP1, K1, BT, BK1)
        weights = forward_weights(
            A1, S1, T1, B1, A2, S2, T2, B2, scale, N1, R1, K1, D1, N2, R2, K2, D2, E1, E2, NI1, NI2, NP1, NP2, DP,
            ACTIVATION, FOLD, LP, SPLIT, BK1, BK2,
        )  # fmt: skip
        forward_tile(
            tile, xs, weights, RESIDUAL, OUT, T, N1, K1, D1, E1, N2, K2, D2, E2, NI1, NI2, NP1, NP2, DP,
            ACTIVATION, FOLD, SAME, LP, PRECISION, MIDDLE_PRECISION, BT, BK1, BK2,
        )  # fmt: skip
    else:
        weights = forward_weights(
            A1, S1, T1, B1, A2, S2, T2, B2, scale, N1, R1, K1, D1, N2, R2, K2, D2, E1, E2, NI1, NI2, NP1, NP2, DP,
            ACTIVATION, FOLD, LP, SPLIT, BK1, BK2,
        )  # fmt: skip
        for tile in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
            xs = load_blocks(tile, X, T, N1, NP1, K1, BT, BK1)
            forward_tile(
                tile, xs, weights, RESIDUAL, OUT, T, N1, K1, D1, E1, N2, K2, D2, E2, NI1, NI2, NP1, NP2, DP,
                ACTIVATION, FOLD, SAME, LP, PRECISION, MIDDLE_PRECISION, BT, BK1, BK2,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def forward_streamed(
    X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, scale, T,
    N1: tl.constexpr, R1: tl.constexpr, K1: tl.constexpr, D1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    NI1: tl.constexpr, NI2: tl.constexpr, NP1: tl.constexpr, NP2: tl.constexpr, DP: tl.constexpr,
    ACTIVATION: tl.constexpr, FOLD: tl.constexpr,
    LP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, MIDDLE_PRECISION: tl.constexpr,
    BT: tl.constexpr, BK1: tl.constexpr, BK2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """For rows too long to be held: column blocks in two loops, whose second read of x comes from the cache."""
    mid = middle_weights(A1, T1, B1, A2, S2, N1, R1, NI1, NP1, D1, E1, N2, R2, NI2, NP2, D2, E2, DP, ACTIVATION, FOLD)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        z = stream(tile, X, T, S1, 1.0, N1, NP1, K1, R1, NI1, True, LP, SPLIT, PRECISION, BT, BK1, STAGES)
        v2 = middle(z, mid, N1, NI1, NP1, D1, E1, N2, NI2, NP2, D2, E2, DP, ACTIVATION, FOLD, BT, MIDDLE_PRECISION)
        p, o_out, m_out = rows(tile, T, BT, N2, NP2, K2)
        v = v_operand(v2, p, N2, LP)
        for b in tl.range(0, (K2 + BK2 - 1) // BK2, num_stages=STAGES):
            u = block(b, BK2)
            m = m_out[:, None] & (u < K2)[None, :]
            o = product(v, t_operand(T2, B2, scale, u, N2, N2 * R2, NI2, K2, LP), PRECISION)
            if RESIDUAL is not None:
                o += tl.load(RESIDUAL + o_out[:, None] + u[None, :], mask=m, other=0.0).to(tl.float32)
            tl.store(OUT + o_out[:, None] + u[None, :], o.to(OUT.dtype.element_ty), mask=m)
