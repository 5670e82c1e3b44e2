"""The backward in two phases, for widths whose weight gradients one program cannot hold.

Phase 1 (`tokens`) reads x and g and keeps each token's dZ and V2, n^2 r numbers each; phase 2 (`columns`) takes any
number of columns of all tokens:

    dx[p, u]  = sum_i s1_i[u] dZ[p, i] (+ g where the residual is x)
    ds1_i[u]  = sum_{tok, p} x[p, u] dZ[p, i]
    dt2_i[u]  = scale sum_{tok, q} V2[q, i] g[q, u]   db2[q, u] = scale sum_tok g[q, u]
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.columns import block, rows, stream
from compacter_kernels.impl.triton.middle import middle_weights
from compacter_kernels.impl.triton.middle_backward import middle_backward, zero_sums
from compacter_kernels.impl.triton.partials import store_left, store_out_side, store_sums, sum_dz
from compacter_kernels.impl.triton.tiles import dot, dz_operand, factor, product, s_operand, v_operand


@triton.jit
def store_columns(P, a, tile, T, BT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, I: tl.constexpr):
    """[BT * NP, NI] as rows (token, p) of [T * n, n r]."""
    _, o_row, m_row = rows(tile, T, BT, N, NP, I)
    c = tl.arange(0, a.shape[1])
    tl.store(P + o_row[:, None] + c[None, :], a, mask=m_row[:, None] & (c < I)[None, :])


@triton.jit(do_not_specialize=["T"])
def tokens(
    X, G, DZ, V2, PART, A1, S1, T1, B1, A2, S2, T2, scale, T,
    N1: tl.constexpr, R1: tl.constexpr, K1: tl.constexpr, D1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    NI1: tl.constexpr, NI2: tl.constexpr, NP1: tl.constexpr, NP2: tl.constexpr, DP: tl.constexpr,
    ROW: tl.constexpr, O_A1: tl.constexpr, O_T1: tl.constexpr, O_B1: tl.constexpr, O_A2: tl.constexpr,
    O_S2: tl.constexpr, ACTIVATION: tl.constexpr, FOLD: tl.constexpr,
    LP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, MIDDLE_PRECISION: tl.constexpr,
    BT: tl.constexpr, BK1: tl.constexpr, BK2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Phase 1: programs walk over tiles of BT tokens, and sum the gradients of the middle."""
    mid = middle_weights(A1, T1, B1, A2, S2, N1, R1, NI1, NP1, D1, E1, N2, R2, NI2, NP2, D2, E2, DP, ACTIVATION, FOLD)
    sums = zero_sums(ACTIVATION, FOLD, BT, DP, NI1, NP1, NI2, NP2)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        z = stream(tile, X, T, S1, 1.0, N1, NP1, K1, R1, NI1, True, LP, SPLIT, PRECISION, BT, BK1, STAGES)
        dv = stream(tile, G, T, T2, scale, N2, NP2, K2, R2, NI2, False, LP, SPLIT, PRECISION, BT, BK2, STAGES)
        dz, v2, sums = middle_backward(
            z, dv, sums, mid, N1, NI1, NP1, D1, E1, NI2, NP2, DP, ACTIVATION, FOLD, BT, MIDDLE_PRECISION
        )
        store_columns(DZ, dz, tile, T, BT, N1, NP1, N1 * R1)
        store_columns(V2, v2, tile, T, BT, N2, NP2, N2 * R2)
    store_sums(
        PART + tl.program_id(0).to(tl.int64) * ROW, sums, A1, T1, A2, S2, O_A1, O_T1, O_B1, O_A2, O_S2,
        N1, R1, NI1, NP1, D1, E1, N2, R2, NI2, NP2, D2, E2, DP, ACTIVATION, FOLD, MIDDLE_PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ROWS"])
def columns(
    X, G, DX, DZ, V2, PART, S1, scale, ROWS,
    N1: tl.constexpr, R1: tl.constexpr, K1: tl.constexpr, N2: tl.constexpr, R2: tl.constexpr, K2: tl.constexpr,
    NI1: tl.constexpr, NI2: tl.constexpr, ROW: tl.constexpr, O_T2: tl.constexpr, O_B2: tl.constexpr,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, IN_SIDE: tl.constexpr, OUT_SIDE: tl.constexpr,
    LP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Phase 2, for one block of columns and every num_programs(1)-th tile of BR rows (token, p).

    Both sides at once where x and g have the same rows, otherwise one launch for each.
    """
    u = block(tl.program_id(0), BK)
    K: tl.constexpr = K1 if IN_SIDE else K2
    m_u = (u < K)[None, :]
    if IN_SIDE:
        c1 = tl.arange(0, NI1)
        s_rows = s_operand(factor(S1, u[:, None], c1[None, :], K1, N1 * R1, R1, True), LP, SPLIT)
        d_s1 = tl.zeros((BK, s_rows.shape[0]), tl.float32)
    if OUT_SIDE:
        c2 = tl.arange(0, NI2)
        d_out = tl.zeros((BK, (4 if NI2 == 4 else 2) * NI2), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(ROWS, BR), tl.num_programs(1), num_stages=STAGES):
        r = tile * BR + tl.arange(0, BR)
        m_r = (r < ROWS)[:, None]
        o = r.to(tl.int64)[:, None] * K + u[None, :]
        if OUT_SIDE or RESIDUAL:
            g = tl.load(G + o, mask=m_r & m_u, other=0.0)
        if IN_SIDE:
            x = tl.load(X + o, mask=m_r & m_u, other=0.0)
            o_dz = r.to(tl.int64)[:, None] * (N1 * R1) + c1[None, :]
            dz = tl.load(DZ + o_dz, mask=m_r & (c1 < N1 * R1)[None, :], other=0.0)
            dz = dz_operand(dz, LP, SPLIT)
            d_s1 = dot(tl.trans(x.to(LP)), dz, d_s1, PRECISION)
            if DX is not None:
                dx = product(dz, s_rows, PRECISION)
                if RESIDUAL:
                    dx += g.to(tl.float32)
                tl.store(DX + o, dx.to(DX.dtype.element_ty), mask=m_r & m_u)
        if OUT_SIDE:
            o_v = r.to(tl.int64)[:, None] * (N2 * R2) + c2[None, :]
            v = tl.load(V2 + o_v, mask=m_r & (c2 < N2 * R2)[None, :], other=0.0)
            v = v_operand(v, r % N2, N2, LP)
            d_out = dot(tl.trans(g.to(LP)), v, d_out, PRECISION)
    row = PART + tl.program_id(1).to(tl.int64) * ROW
    if IN_SIDE:
        store_left(row, sum_dz(d_s1, NI1), u[:, None], c1[None, :], K1, N1 * R1, R1)
    if OUT_SIDE:
        store_out_side(row + O_T2, row + O_B2, d_out, u, scale, K2, N2, N2 * R2, NI2, HAS_BIAS)
