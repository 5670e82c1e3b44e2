"""The backward kernel, which reads x and g = dout once, writes dx once, and recomputes the rest.

    Z[p, i]   = sum_u x[p, u] s1_i[u]               dV2[q, i] = scale sum_u g[q, u] t2_i[u]
    Z, dV2 -> dZ, V2 (middle_backward.py)
    dx[p, u]  = sum_i s1_i[u] dZ[p, i] (+ g if the residual is x)
    ds1_i[u]  = sum_{tok, p} x[p, u] dZ[p, i]
    dt2_i[u]  = scale sum_{tok, q} V2[q, i] g[q, u]   db2[q, u] = scale sum_tok g[q, u]

Each program sums the weight gradients over its tiles and writes one row of partials (partials.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.columns import block, contract, load_blocks, rows
from compacter_kernels.impl.triton.middle import held_weights
from compacter_kernels.impl.triton.middle_backward import held_backward, zero_folded_sums
from compacter_kernels.impl.triton.partials import store_factor, store_held_sums, store_out_side, sum_dz
from compacter_kernels.impl.triton.tiles import (
    add_product,
    dz_operand,
    factor,
    product,
    s_operand,
    v_operand,
    wide_split,
)


@triton.jit
def backward_tiles(walk, row, X, G, DX, A1, S1, T1, B1, A2, S2, T2, scale, T, P: tl.constexpr):
    """The tiles of a walk (first, end, step), whose x and g stay on chip; a row of their sums."""
    NB1: tl.constexpr = (P.IN.K + P.BK - 1) // P.BK
    NB2: tl.constexpr = (P.OUT.K + P.BK - 1) // P.BK
    LP: tl.constexpr = P.PRECISION.LP
    SPLIT: tl.constexpr = P.PRECISION.SPLIT
    WIDE: tl.constexpr = P.PRECISION.WIDE
    SUMS: tl.constexpr = P.PRECISION.SUMS  # the same for operands in LP, but with "bf16" registers are short
    c1 = tl.arange(0, P.IN.NI)
    c2 = tl.arange(0, P.OUT.NI)
    s1 = ()
    s1_rows = ()
    d_s1 = ()
    for b in tl.static_range(NB1):
        s = factor(S1, block(b, P.BK)[:, None], c1[None, :], P.IN.K, P.IN, True)
        s1 = s1 + (wide_split(s, LP, SPLIT),)
        s1_rows = s1_rows + (s_operand(s, LP, SPLIT),)
        d_s1 = d_s1 + (tl.zeros((P.BK, s1_rows[0].shape[0]), tl.float32),)
    t2 = ()
    d_out = ()
    for b in tl.static_range(NB2):
        t = factor(T2, block(b, P.BK)[:, None], c2[None, :], P.OUT.K, P.OUT, False) * scale
        t2 = t2 + (wide_split(t, LP, SPLIT),)
        d_out = d_out + (tl.zeros((P.BK, (4 if P.OUT.NI == 4 else 2) * P.OUT.NI), tl.float32),)
    held = held_weights(A1, T1, B1, A2, S2, P)
    sums = ()
    for _b in tl.static_range(P.DP // P.EB):
        sums = sums + zero_folded_sums(P)
    for tile in tl.range(walk[0], walk[1], walk[2], num_stages=P.STAGES):
        _, first, o_x, m_x = rows(tile, T, P.IN.K, P.IN, P)
        p2 = tl.arange(0, P.BT * P.OUT.NP) % P.OUT.NP
        xs = load_blocks(tile, X, T, P.IN, P)
        gs = load_blocks(tile, G, T, P.OUT, P)
        z = contract(xs, s1, P.IN, P)
        dv = contract(gs, t2, P.OUT, P)
        dz, v2, sums = held_backward(z, dv, sums, held, P)
        dz = dz_operand(dz, LP, SPLIT)
        v = v_operand(v2, p2, P.OUT.N, LP)
        next_s1 = ()
        for b in tl.static_range(NB1):
            u = block(b, P.BK)
            m = m_x[:, None]
            if P.IN.K % P.BK:
                m &= (u < P.IN.K)[None, :]
            next_s1 = next_s1 + (add_product(d_s1[b], tl.trans(xs[b].to(LP)), dz, 1, SUMS),)
            if DX is not None:
                dx = product(dz, s1_rows[b], WIDE)
                if P.OPTIONS.RESIDUAL:
                    if P.SQUARE:
                        dx += gs[b].to(tl.float32)
                    else:
                        dx += tl.load(G + first + (o_x[:, None] + u[None, :]), mask=m, other=0.0).to(tl.float32)
                tl.store(DX + first + (o_x[:, None] + u[None, :]), dx.to(DX.dtype.element_ty), mask=m)
        d_s1 = next_s1
        next_out = ()
        for b in tl.static_range(NB2):
            next_out = next_out + (add_product(d_out[b], tl.trans(gs[b].to(LP)), v, 1, SUMS),)
        d_out = next_out
    for b in tl.static_range(NB1):
        store_factor(row, sum_dz(d_s1[b], P.IN.NI), block(b, P.BK)[:, None], c1[None, :], P.IN.K, P.IN, True)
    for b in tl.static_range(NB2):
        store_out_side(row, d_out[b], block(b, P.BK), scale, P)
    store_held_sums(row, sums, A1, T1, A2, S2, P)


@triton.jit(do_not_specialize=["T"])
def backward(X, G, DX, PART, A1, S1, T1, B1, A2, S2, T2, scale, T, P: tl.constexpr):
    """Each program loops over tiles of BT tokens."""
    walk = (tl.program_id(0), tl.cdiv(T, P.BT), tl.num_programs(0))
    row = PART + tl.program_id(0).to(tl.int64) * P.OFFSETS.ROW
    backward_tiles(walk, row, X, G, DX, A1, S1, T1, B1, A2, S2, T2, scale, T, P)
