"""The backward in two phases, for widths whose weight gradients one program cannot hold.

Phase 1 (`tokens`) reads x and g and stores Z, dV2, dZ, V2 of each token. Phase 2 sums over tokens,
for the wide factors by blocks of columns (`columns`), for the rest by bottleneck blocks (`sums`).

    dx[p, u]  = sum_i s1_i[u] dZ[p, i] (+ g if the residual is x)
    ds1_i[u]  = sum_{tok, p} x[p, u] dZ[p, i]
    dt2_i[u]  = scale sum_{tok, q} V2[q, i] g[q, u]   db2[q, u] = scale sum_tok g[q, u]
    all others from Z and dV2 (middle_backward.py)
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.columns import block, rows, stream
from compacter_kernels.impl.triton.middle import again, folded_weights, once
from compacter_kernels.impl.triton.middle_backward import (
    add_rule,
    block_gradients,
    folded_sums,
    in_sums,
    middle_backward,
    out_sums,
    zero_folded_sums,
    zero_unfolded_sums,
)  # fmt: skip
from compacter_kernels.impl.triton.partials import (
    store_factor,
    store_folded_sums,
    store_out_side,
    store_rule_sum,
    store_unfolded_sums,
    sum_dz,
)  # fmt: skip
from compacter_kernels.impl.triton.tiles import add_product, dz_operand, factor, output, s_operand, v_operand


@triton.jit
def narrow(tile, T, side: tl.constexpr, P: tl.constexpr):
    """The offsets and the mask of a tile [BT * NP, NI] in [T * n, n r]."""
    _, first, o_row, m_row = rows(tile, T, side.C, side, P)
    c = tl.arange(0, side.NI)
    return first + (o_row[:, None] + c[None, :]), m_row[:, None] & (c < side.C)[None, :]


@triton.jit(do_not_specialize=["T"])
def tokens(X, G, Z, DV, DZ, V2, A1, S1, T1, B1, A2, S2, T2, scale, T, P: tl.constexpr):
    """Phase 1: each program loops over tiles of BT tokens."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, P.BT), tl.num_programs(0)):
        z = stream(tile, X, T, S1, 1.0, P.IN, P, True)
        dv = stream(tile, G, T, T2, scale, P.OUT, P, False)
        o_in, m_in = narrow(tile, T, P.IN, P)
        o_out, m_out = narrow(tile, T, P.OUT, P)
        tl.store(Z + o_in, z, mask=m_in)
        tl.store(DV + o_out, dv, mask=m_out)
        dz, v2 = middle_backward(z, dv, tile, T, A1, T1, B1, A2, S2, P)
        tl.store(DZ + o_in, dz, mask=m_in)
        tl.store(V2 + o_out, v2, mask=m_out)


@triton.jit(do_not_specialize=["T"])
def sums(Z, DV, PART, A1, T1, B1, A2, S2, T, P: tl.constexpr):
    """Phase 2 for the small gradients, over every num_programs(1)-th tile of BT tokens.

    A program sums a block of a folded bottleneck, or one unfolded side: it cannot hold both.
    """
    b = tl.program_id(0)
    if P.FOLD:
        total = zero_folded_sums(P)
    elif P.ACTIVATION is None:
        total = (tl.zeros((P.IN.NI, P.IN.NP, P.IN.NP), tl.float32),)
    else:
        total = zero_unfolded_sums(P.IN if P.OPTIONS.IN_SIDE else P.OUT, P)
    for tile in tl.range(tl.program_id(1), tl.cdiv(T, P.BT), tl.num_programs(1)):
        o_in, m_in = narrow(tile, T, P.IN, P)
        o_out, m_out = narrow(tile, T, P.OUT, P)
        zero = again(tile, T)
        if P.FOLD:
            zj = tl.reshape(tl.load(Z + o_in, mask=m_in, other=0.0), (P.BT, P.IN.NP * P.IN.NI))
            dvj = tl.reshape(tl.load(DV + o_out, mask=m_out, other=0.0), (P.BT, P.OUT.NP * P.OUT.NI))
            if P.ACTIVATION is None:
                total = (add_product(total[0], tl.trans(zj), dvj, 1, P.PRECISION.SUMS),)
            else:
                weights = folded_weights(b + zero, A1, T1, B1, A2, S2, P)
                h, dy = block_gradients(b, zj, dvj, weights, once(T), P)
                total = folded_sums(total, zj, dvj, h, dy, once(T), P)
        elif P.ACTIVATION is None:
            z = tl.load(Z + o_in, mask=m_in, other=0.0)
            total = (add_rule(total[0], z, tl.load(DV + o_out, mask=m_out, other=0.0), P.IN, P),)
        elif P.OPTIONS.IN_SIDE:
            total = in_sums(total, (Z + o_in, m_in), (DV + o_out, m_out), zero, A1, T1, B1, A2, S2, P)
        else:
            total = out_sums(total, (Z + o_in, m_in), (DV + o_out, m_out), zero, A1, T1, B1, A2, S2, P)
    row = PART + tl.program_id(1).to(tl.int64) * P.OFFSETS.ROW
    if P.ACTIVATION is None:
        store_rule_sum(row, total[0], P)
    elif P.FOLD:
        store_folded_sums(row, b, total, A1, T1, A2, S2, P)
    else:
        store_unfolded_sums(row, total, P)


@triton.jit(do_not_specialize=["T"])
def columns(X, G, DX, DZ, V2, PART, S1, scale, T, P: tl.constexpr):
    """Phase 2 for one block of columns, over every num_programs(1)-th tile of BT rows (token, p).

    One launch computes both sides if x and g have equal rows; otherwise each side has one.
    """
    LP: tl.constexpr = P.PRECISION.LP
    SPLIT: tl.constexpr = P.PRECISION.SPLIT
    WIDE: tl.constexpr = P.PRECISION.WIDE
    IN_SIDE: tl.constexpr = P.OPTIONS.IN_SIDE
    OUT_SIDE: tl.constexpr = P.OPTIONS.OUT_SIDE
    K: tl.constexpr = P.IN.K if IN_SIDE else P.OUT.K
    N: tl.constexpr = P.IN.N if IN_SIDE else P.OUT.N
    u = block(tl.program_id(0), P.BK)
    m_u = (u < K)[None, :]
    if IN_SIDE:
        NI: tl.constexpr = P.IN.NI if SPLIT or P.IN.NI > 16 else 16  # the least inner size of a product
        c1 = tl.arange(0, NI)
        s_rows = s_operand(factor(S1, u[:, None], c1[None, :], P.IN.K, P.IN, True), LP, SPLIT)
        d_s1 = tl.zeros((P.BK, s_rows.shape[0]), tl.float32)
    if OUT_SIDE:
        c2 = tl.arange(0, P.OUT.NI)
        d_out = tl.zeros((P.BK, (4 if P.OUT.NI == 4 else 2) * P.OUT.NI), tl.float32)
    count = T.to(tl.int64) * N
    r = tl.arange(0, P.BT)
    o = r[:, None] * K + u[None, :]
    tiles = tl.cdiv(count, P.BT).to(tl.int32)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1), num_stages=P.STAGES):
        first = tl.full((), P.BT, tl.int64) * tile
        m_r = (r < tl.minimum(count - first, P.BT).to(tl.int32))[:, None]
        if OUT_SIDE or P.OPTIONS.RESIDUAL:
            g = tl.load(G + first * K + o, mask=m_r & m_u, other=0.0)
        if IN_SIDE:
            x = tl.load(X + first * K + o, mask=m_r & m_u, other=0.0)
            o_dz = r[:, None] * P.IN.C + c1[None, :]
            dz = tl.load(DZ + first * P.IN.C + o_dz, mask=m_r & (c1 < P.IN.C)[None, :], other=0.0)
            dz = dz_operand(dz, LP, SPLIT)
            d_s1 = add_product(d_s1, tl.trans(x.to(LP)), dz, 1, WIDE)
            if DX is not None:
                dx = output(dz, s_rows, P)
                if P.OPTIONS.RESIDUAL:
                    dx += g.to(tl.float32)
                tl.store(DX + first * K + o, dx.to(DX.dtype.element_ty), mask=m_r & m_u)
        if OUT_SIDE:
            o_v = r[:, None] * P.OUT.C + c2[None, :]
            v = tl.load(V2 + first * P.OUT.C + o_v, mask=m_r & (c2 < P.OUT.C)[None, :], other=0.0)
            v = v_operand(v, ((first % N).to(tl.int32) + r) % N, N, LP)
            d_out = add_product(d_out, tl.trans(g.to(LP)), v, 1, WIDE)
    row = PART + tl.program_id(1).to(tl.int64) * P.OFFSETS.ROW
    if IN_SIDE:
        store_factor(row, sum_dz(d_s1, NI), u[:, None], c1[None, :], P.IN.K, P.IN, True)
    if OUT_SIDE:
        store_out_side(row, d_out, u, scale, P)
