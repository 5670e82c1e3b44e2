"""The backward kernel: x and g = dout are read once, dx is written once, all else is recomputed.

    Z[p, i]   = sum_u x[p, u] s1_i[u]               dV2[q, i] = scale sum_u g[q, u] t2_i[u]
    Z, dV2 -> dZ, V2 (middle_backward.py)
    dx[p, u]  = sum_i s1_i[u] dZ[p, i] (+ g where the residual is x)
    ds1_i[u]  = sum_{tok, p} x[p, u] dZ[p, i]
    dt2_i[u]  = scale sum_{tok, q} V2[q, i] g[q, u]   db2[q, u] = scale sum_tok g[q, u]

Weight gradients are summed by each program over its own tiles, and written as one row of partials (partials.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.columns import block, contract, load_blocks, rows
from compacter_kernels.impl.triton.middle import middle_weights
from compacter_kernels.impl.triton.middle_backward import middle_backward, zero_sums
from compacter_kernels.impl.triton.partials import store_left, store_out_side, store_sums, sum_dz
from compacter_kernels.impl.triton.tiles import dot, dz_operand, factor, product, s_operand, v_operand, wide_split


@triton.jit(do_not_specialize=["T"])
def backward(
    X, G, DX, PART, A1, S1, T1, B1, A2, S2, T2, scale, T,
    N1: tl.constexpr, R1: tl.constexpr, K1: tl.constexpr, D1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    NI1: tl.constexpr, NI2: tl.constexpr, NP1: tl.constexpr, NP2: tl.constexpr, DP: tl.constexpr,
    ROW: tl.constexpr, O_T2: tl.constexpr, O_B2: tl.constexpr, O_A1: tl.constexpr, O_T1: tl.constexpr,
    O_B1: tl.constexpr, O_A2: tl.constexpr, O_S2: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, FOLD: tl.constexpr, SQUARE: tl.constexpr,
    LP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, MIDDLE_PRECISION: tl.constexpr,
    BT: tl.constexpr, BK1: tl.constexpr, BK2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs walk over tiles of BT tokens, whose x and g stay on chip. SQUARE: both have the same rows."""
    NB1: tl.constexpr = (K1 + BK1 - 1) // BK1
    NB2: tl.constexpr = (K2 + BK2 - 1) // BK2
    I1: tl.constexpr = N1 * R1
    I2: tl.constexpr = N2 * R2
    c1 = tl.arange(0, NI1)
    c2 = tl.arange(0, NI2)
    s1 = ()
    s1_rows = ()
    d_s1 = ()
    for b in tl.static_range(NB1):
        u = block(b, BK1)
        s = factor(S1, u[:, None], c1[None, :], K1, I1, R1, True)
        s1 = s1 + (wide_split(s, LP, SPLIT),)
        s1_rows = s1_rows + (s_operand(s, LP, SPLIT),)
        d_s1 = d_s1 + (tl.zeros((BK1, s1_rows[0].shape[0]), tl.float32),)
    t2 = ()
    d_out = ()
    for b in tl.static_range(NB2):
        u = block(b, BK2)
        t2 = t2 + (wide_split(factor(T2, u[:, None], c2[None, :], K2, I2, R2, False) * scale, LP, SPLIT),)
        d_out = d_out + (tl.zeros((BK2, (4 if NI2 == 4 else 2) * NI2), tl.float32),)
    mid = middle_weights(A1, T1, B1, A2, S2, N1, R1, NI1, NP1, D1, E1, N2, R2, NI2, NP2, D2, E2, DP, ACTIVATION, FOLD)
    sums = zero_sums(ACTIVATION, FOLD, BT, DP, NI1, NP1, NI2, NP2)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0), num_stages=STAGES):
        _, o_x, m_x = rows(tile, T, BT, N1, NP1, K1)
        p2, _, _ = rows(tile, T, BT, N2, NP2, K2)
        xs = load_blocks(tile, X, T, N1, NP1, K1, BT, BK1)
        gs = load_blocks(tile, G, T, N2, NP2, K2, BT, BK2)
        z = contract(xs, s1, NI1, NB1, LP, PRECISION)
        dv = contract(gs, t2, NI2, NB2, LP, PRECISION)
        dz, v2, sums = middle_backward(
            z, dv, sums, mid, N1, NI1, NP1, D1, E1, NI2, NP2, DP, ACTIVATION, FOLD, BT,
            MIDDLE_PRECISION,
        )  # fmt: skip
        dz = dz_operand(dz, LP, SPLIT)
        v = v_operand(v2, p2, N2, LP)
        next_s1 = ()
        for b in tl.static_range(NB1):
            u = block(b, BK1)
            m = m_x[:, None] & (u < K1)[None, :]
            next_s1 = next_s1 + (dot(tl.trans(xs[b].to(LP)), dz, d_s1[b], PRECISION),)
            if DX is not None:
                dx = product(dz, s1_rows[b], PRECISION)
                if RESIDUAL:
                    if SQUARE:
                        dx += gs[b].to(tl.float32)
                    else:
                        dx += tl.load(G + o_x[:, None] + u[None, :], mask=m, other=0.0).to(tl.float32)
                tl.store(DX + o_x[:, None] + u[None, :], dx.to(DX.dtype.element_ty), mask=m)
        d_s1 = next_s1
        next_out = ()
        for b in tl.static_range(NB2):
            next_out = next_out + (dot(tl.trans(gs[b].to(LP)), v, d_out[b], PRECISION),)
        d_out = next_out
    row = PART + tl.program_id(0).to(tl.int64) * ROW
    for b in tl.static_range(NB1):
        u = block(b, BK1)
        store_left(row, sum_dz(d_s1[b], NI1), u[:, None], c1[None, :], K1, I1, R1)
    for b in tl.static_range(NB2):
        u = block(b, BK2)
        store_out_side(row + O_T2, row + O_B2, d_out[b], u, scale, K2, N2, I2, NI2, HAS_BIAS)
    store_sums(
        row, sums, A1, T1, A2, S2, O_A1, O_T1, O_B1, O_A2, O_S2,
        N1, R1, NI1, NP1, D1, E1, N2, R2, NI2, NP2, D2, E2, DP, ACTIVATION, FOLD, MIDDLE_PRECISION,
    )  # fmt: skip
