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

from compacter_kernels.impl.triton.columns import block, count, gathered, rows, stream
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
    store_dense,
    store_factor,
    store_folded_sums,
    store_out_side,
    store_rule_sum,
    store_unfolded_sums,
    sum_dz,
)  # fmt: skip
from compacter_kernels.impl.triton.tiles import (
    add_product,
    dz_operand,
    factor,
    mixed_operand,
    output,
    s_operand,
    v_operand,
)


@triton.jit
def narrow(tile, T, side: tl.constexpr, P: tl.constexpr):
    """The offsets and the mask of a tile [BT * NP, NI] in [T * n, n r], which has no order."""
    c = tl.arange(0, side.NI)
    if P.ROUTED:
        r = tl.arange(0, P.BT * side.NP)
        token, p = tile * P.BT + r // side.NP, r % side.NP
        o_row = (T[1] + token).to(tl.int64) * (side.N * side.C) + p * side.C
        return o_row[:, None] + c[None, :], ((token < T[0]) & (p < side.N))[:, None] & (c < side.C)[None, :]
    else:
        _, first, o_row, m_row = rows(tile, T, side.C, side, P)
        return first + (o_row[:, None] + c[None, :]), m_row[:, None] & (c < side.C)[None, :]


@triton.jit
def token_tiles(walk, X, G, Z, DV, DZ, V2, A1, S1, T1, B1, A2, S2, T2, DX, scale, T, P: tl.constexpr):
    """Phase 1 for the tiles of a walk (first, end, step); with dense projections it writes dx."""
    for tile in tl.range(walk[0], walk[1], walk[2]):
        zero = again(tile, count(T, P)) if P.DENSE and P.ROUTED else 0  # no registers for addresses
        z = stream(tile, X, T, S1 + zero, 1.0, P.IN, P, True)
        dv = stream(tile, G, T, T2 + zero, scale, P.OUT, P, False)
        o_in, m_in = narrow(tile, T, P.IN, P)
        o_out, m_out = narrow(tile, T, P.OUT, P)
        if not P.DENSE:
            tl.store(Z + o_in, z, mask=m_in)
            tl.store(DV + o_out, dv, mask=m_out)
        dz, v2 = middle_backward(z, dv, tile, count(T, P), A1, T1, B1, A2, S2, P)
        tl.store(DZ + o_in, dz, mask=m_in)
        tl.store(V2 + o_out, v2, mask=m_out)
        if P.DENSE and DX is not None:
            dense_gradient(tile + zero, dz, G, DX, S1 + zero, T, P)


@triton.jit
def dense_gradient(tile, dz, G, DX, S1, T, P: tl.constexpr):
    """dx = dZ s (+ g), by blocks of columns."""
    LP: tl.constexpr = P.PRECISION.LP
    c = tl.arange(0, P.IN.NI)
    _, first, o_x, m_x = rows(tile, T, P.IN.K, P.IN, P)
    dz = dz.to(LP)
    for b in tl.range(0, (P.IN.K + P.BK - 1) // P.BK, num_stages=P.STAGES):
        u = block(b, P.BK)
        m = m_x[:, None] & (u < P.IN.K)[None, :]
        dx = output(dz, s_operand(factor(S1, u[:, None], c[None, :], P.IN.K, P.IN, True), LP, False), P)
        if P.OPTIONS.RESIDUAL:
            dx += tl.load(G + first + (o_x[:, None] + u[None, :]), mask=m, other=0.0).to(tl.float32)
        tl.store(DX + first + (o_x[:, None] + u[None, :]), dx.to(DX.dtype.element_ty), mask=m)


@triton.jit
def sum_tiles(walk, row, b, Z, DV, A1, T1, B1, A2, S2, T, P: tl.constexpr):
    """Phase 2 for the small gradients of block b, over the tiles of a walk; a row of their sums."""
    if P.FOLD:
        total = zero_folded_sums(P)
    elif P.ACTIVATION is None:
        total = (tl.zeros((P.IN.NI, P.IN.NP, P.OUT.NP), tl.float32),)
    else:
        total = zero_unfolded_sums(P.IN if P.OPTIONS.IN_SIDE else P.OUT, P)
    # An unfolded bank has no registers for what the compiler would compute before the loop.
    for tile in tl.range(walk[0], walk[1], walk[2], disable_licm=P.ROUTED and not P.FOLD):
        o_in, m_in = narrow(tile, T, P.IN, P)
        o_out, m_out = narrow(tile, T, P.OUT, P)
        zero = again(tile, count(T, P))
        if P.FOLD:
            zj = tl.reshape(tl.load(Z + o_in, mask=m_in, other=0.0), (P.BT, P.IN.NP * P.IN.NI))
            dvj = tl.reshape(tl.load(DV + o_out, mask=m_out, other=0.0), (P.BT, P.OUT.NP * P.OUT.NI))
            if P.ACTIVATION is None:
                total = (add_product(total[0], tl.trans(zj), dvj, 1, P.PRECISION.SUMS),)
            else:
                weights = folded_weights(b + zero, A1, T1, B1, A2, S2, P)
                turns = once(count(T, P))
                h, dy = block_gradients(b, zj, dvj, weights, turns, P)
                total = folded_sums(total, zj, dvj, h, dy, turns, P)
        elif P.ACTIVATION is None:
            z = tl.load(Z + o_in, mask=m_in, other=0.0)
            total = (add_rule(total[0], z, tl.load(DV + o_out, mask=m_out, other=0.0), P.IN, P.OUT, P),)
        elif P.OPTIONS.IN_SIDE:
            total = in_sums(total, (Z + o_in, m_in), (DV + o_out, m_out), zero, A1, T1, B1, A2, S2, P)
        else:
            total = out_sums(total, (Z + o_in, m_in), (DV + o_out, m_out), zero, A1, T1, B1, A2, S2, P)
    if P.ACTIVATION is None:
        store_rule_sum(row, total[0], P)
    elif P.FOLD:
        store_folded_sums(row, b, total, A1, T1, A2, S2, P)
    else:
        store_unfolded_sums(row, total, P)


@triton.jit
def column_tiles(walk, row, b, X, G, DX, DZ, V2, S1, MIX, per, scale, T, P: tl.constexpr):
    """Phase 2 for block b of columns, over the tiles of BT rows (token, p); a row of its sums.

    MIX: the weights [T / per, E] of an adapter of a mixed bank, else None.
    """
    LP: tl.constexpr = P.PRECISION.LP
    SPLIT: tl.constexpr = P.PRECISION.SPLIT
    WIDE: tl.constexpr = P.PRECISION.WIDE
    IN_SIDE: tl.constexpr = P.OPTIONS.IN_SIDE
    OUT_SIDE: tl.constexpr = P.OPTIONS.OUT_SIDE
    K: tl.constexpr = P.IN.K if IN_SIDE else P.OUT.K
    N: tl.constexpr = P.IN.N if IN_SIDE else P.OUT.N
    part = 0
    if P.DENSE:
        part, b = b % P.PARTS, b // P.PARTS
    u = block(b, P.BK)
    m_u = (u < K)[None, :]
    if P.DENSE:
        NI: tl.constexpr = P.IN.NI // P.PARTS
        c1 = part * NI + tl.arange(0, NI)
        c2 = c1
        d_s1 = tl.zeros((P.BK, NI), tl.float32)
        d_out, d_b1, d_b2 = d_s1, tl.zeros((NI,), tl.float32), tl.zeros((P.BK,), tl.float32)
    elif IN_SIDE:
        NI: tl.constexpr = P.IN.NI if SPLIT or P.IN.NI > 16 else 16  # the least inner size of a product
        c1 = tl.arange(0, NI)
        s_rows = s_operand(factor(S1, u[:, None], c1[None, :], P.IN.K, P.IN, True), LP, SPLIT)
        d_s1 = tl.zeros((P.BK, s_rows.shape[0]), tl.float32)
    if OUT_SIDE and not P.DENSE:
        c2 = tl.arange(0, P.OUT.NI)
        d_out = tl.zeros((P.BK, (4 if P.OUT.NI == 4 else 2) * P.OUT.NI), tl.float32)
    number = count(T, P).to(tl.int64) * N
    if P.ROUTED:
        DZ += T[1].to(tl.int64) * (P.IN.N * P.IN.C)
        V2 += T[1].to(tl.int64) * (P.OUT.N * P.OUT.C)
    r = tl.arange(0, P.BT)
    o = r[:, None] * K + u[None, :]
    for tile in tl.range(walk[0], walk[1], walk[2], num_stages=P.STAGES):
        first = tl.full((), P.BT, tl.int64) * tile
        m_r = (r < tl.minimum(number - first, P.BT).to(tl.int32))[:, None]
        if P.ROUTED:
            row_of_x, _ = gathered((first + r) // N, T)
            wide, at = 0, (row_of_x * N + (first + r) % N)[:, None] * K + u[None, :]
        else:
            wide, at = first * K, o
        if OUT_SIDE or P.OPTIONS.RESIDUAL:
            g = tl.load(G + wide + at, mask=m_r & m_u, other=0.0)
        if IN_SIDE:
            x = tl.load(X + wide + at, mask=m_r & m_u, other=0.0)
            o_dz = r[:, None] * P.IN.C + c1[None, :]
            dz = tl.load(DZ + first * P.IN.C + o_dz, mask=m_r & (c1 < P.IN.C)[None, :], other=0.0)
            if P.DENSE:
                d_b1 += tl.sum(dz, 0)
            dz = dz_operand(dz, LP, SPLIT)
            d_s1 = add_product(d_s1, tl.trans(x.to(LP)), dz, 1, WIDE)
            if DX is not None and not P.DENSE:
                dx = output(dz, s_rows, P)
                if P.OPTIONS.RESIDUAL:
                    dx += g.to(tl.float32)
                tl.store(DX + wide + at, dx.to(DX.dtype.element_ty), mask=m_r & m_u)
        if OUT_SIDE:
            o_v = r[:, None] * P.OUT.C + c2[None, :]
            v = tl.load(V2 + first * P.OUT.C + o_v, mask=m_r & (c2 < P.OUT.C)[None, :], other=0.0)
            if P.MIXED:
                token = (first + r) // N
                w = tl.load(MIX + token // per * P.MIXED, mask=token < T, other=0.0).to(tl.float32)
            if P.DENSE:
                v = v.to(LP)
                if P.MIXED and P.OPTIONS.HAS_BIAS:
                    d_b2 += tl.sum(g.to(tl.float32) * w[:, None], 0)
                elif P.OPTIONS.HAS_BIAS:
                    d_b2 += tl.sum(g.to(tl.float32), 0)
            elif P.MIXED:
                v = mixed_operand(v, ((first % N).to(tl.int32) + r) % N, w, N, LP)
            else:
                v = v_operand(v, ((first % N).to(tl.int32) + r) % N, N, LP)
            d_out = add_product(d_out, tl.trans(g.to(LP)), v, 1, WIDE)
    if IN_SIDE:
        store_factor(row, sum_dz(d_s1, NI), u[:, None], c1[None, :], P.IN.K, P.IN, True)
    if P.DENSE:
        store_dense(row, d_out, d_b1, d_b2, b, part, u, c2, scale, P)
    elif OUT_SIDE:
        store_out_side(row, d_out, u, scale, P)


@triton.jit(do_not_specialize=["T"])
def tokens(X, G, Z, DV, DZ, V2, A1, S1, T1, B1, A2, S2, T2, DX, scale, T, P: tl.constexpr):
    """Phase 1: each program loops over tiles of BT tokens."""
    walk = (tl.program_id(0), tl.cdiv(T, P.BT), tl.num_programs(0))
    token_tiles(walk, X, G, Z, DV, DZ, V2, A1, S1, T1, B1, A2, S2, T2, DX, scale, T, P)


@triton.jit(do_not_specialize=["T"])
def sums(Z, DV, PART, A1, T1, B1, A2, S2, T, P: tl.constexpr):
    """Phase 2 for the small gradients, over every num_programs(1)-th tile of BT tokens.

    A program sums a block of a folded bottleneck, or one unfolded side: it cannot hold both.
    """
    walk = (tl.program_id(1), tl.cdiv(T, P.BT), tl.num_programs(1))
    row = PART + tl.program_id(1).to(tl.int64) * P.OFFSETS.ROW
    sum_tiles(walk, row, tl.program_id(0), Z, DV, A1, T1, B1, A2, S2, T, P)


@triton.jit(do_not_specialize=["T"])
def columns(X, G, DX, DZ, V2, PART, S1, scale, T, P: tl.constexpr):
    """Phase 2 for one block of columns, over every num_programs(1)-th tile of BT rows (token, p).

    One launch computes both sides if x and g have equal rows; otherwise each side has one.
    """
    N: tl.constexpr = P.IN.N if P.OPTIONS.IN_SIDE else P.OUT.N
    walk = (tl.program_id(1), tl.cdiv(T.to(tl.int64) * N, P.BT).to(tl.int32), tl.num_programs(1))
    row = PART + tl.program_id(1).to(tl.int64) * P.OFFSETS.ROW
    column_tiles(walk, row, tl.program_id(0), X, G, DX, DZ, V2, S1, None, 1, scale, T, P)
