"""The kernels of a mixed bank: out = residual + sum_e w_e (adapter e), with the w of each token.

All scratch of a token has E layers, [E, T * n, n r]. `mixed_middle` and `mixed_tokens` read a tile
of x, and of g, from memory for the first adapter and from a cache for the others. `mixed_expand`
writes the output, or dx, once. With V2_e and dV2_e before their weight,

    dw_e = <V2_e, dV2_e> + scale <g, b2_e>,     and all other gradients take w_e V2_e and w_e dV2_e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.bank import own
from compacter_kernels.impl.triton.columns import block, rows, stream
from compacter_kernels.impl.triton.middle import again, middle
from compacter_kernels.impl.triton.middle_backward import middle_backward
from compacter_kernels.impl.triton.tiles import (
    add_turned,
    dz_operand,
    factor,
    mixed_operand,
    s_operand,
    t_operand,
    turned,
)  # fmt: skip
from compacter_kernels.impl.triton.two_phase import column_tiles, narrow, sum_tiles


@triton.jit
def weight_of(tile, e, MIX, T, per, side: tl.constexpr, P: tl.constexpr):
    """w_e in the rows (token, p) of a tile; MIX [T / per, E]."""
    token = tile * P.BT + tl.arange(0, P.BT * side.NP) // side.NP
    o_mix = (token // per).to(tl.int64) * P.MIXED + e
    return tl.load(MIX + o_mix, mask=token < T, other=0.0).to(tl.float32)


@triton.jit
def layer(SCRATCH, e, T, side: tl.constexpr):
    """The pointer to what adapter e has in [E, T * n, n r]."""
    return SCRATCH + tl.full((), side.N * side.C, tl.int64) * T * e


@triton.jit
def store_layer(SCRATCH, e, tile, value, T, side: tl.constexpr, P: tl.constexpr):
    """Store what adapter e has in a tile."""
    o, m = narrow(tile, T, side, P)
    tl.store(layer(SCRATCH, e, T, side) + o, value, mask=m)


@triton.jit(do_not_specialize=["T", "per"])
def mixed_middle(X, V2, A1, S1, T1, B1, A2, S2, MIX, T, per, P: tl.constexpr):
    """w_e V2_e of each adapter and token."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, P.BT), tl.num_programs(0)):
        for e in tl.range(0, P.MIXED):
            z = stream(tile, X, T, own(S1, 1, e, P), 1.0, P.IN, P, True)
            v2 = middle(
                z, tile, T, own(A1, 0, e, P), own(T1, 2, e, P), own(B1, 3, e, P), own(A2, 4, e, P), own(S2, 5, e, P), P
            )  # fmt: skip
            v2 *= weight_of(tile, e, MIX, T, per, P.OUT, P)[:, None]
            store_layer(V2, e, tile, v2, T, P.OUT, P)


@triton.jit
def dense_sum(total, tile, u, V, W, scale, T, side: tl.constexpr, P: tl.constexpr, LEFT: tl.constexpr):
    """total + the products of `expand` for dense projections, by blocks of the bottleneck."""
    LP: tl.constexpr = P.PRECISION.LP
    NI: tl.constexpr = side.NI // P.PARTS
    token = tile * P.BT + tl.arange(0, P.BT)
    for i in tl.range(0, P.MIXED * P.PARTS):
        e = i // P.PARTS
        c = i % P.PARTS * NI + tl.arange(0, NI)
        o_v = token.to(tl.int64)[:, None] * side.C + c[None, :]
        v = tl.load(layer(V, e, T, side) + o_v, mask=(token < T)[:, None] & (c < side.C)[None, :], other=0.0)
        w = factor(own(W, 1 if LEFT else 6, e, P), u[:, None], c[None, :], side.K, side, LEFT)
        total = add_turned(total, v.to(LP), tl.trans((w * scale).to(LP)), P)
    return total


@triton.jit
def with_biases(o, tile, u, B, MIX, scale, T, per, side: tl.constexpr, P: tl.constexpr):
    """o + sum_e w_e b_e."""
    for e in tl.range(0, P.MIXED):
        b2 = tl.load(own(B, 7, e, P) + u, mask=u < side.K, other=0.0).to(tl.float32) * scale
        o += weight_of(tile, e, MIX, T, per, side, P)[:, None] * b2[None, :]
    return o


@triton.jit
def expand(V, RESIDUAL, OUT, W, B, MIX, scale, T, per, side: tl.constexpr, P: tl.constexpr, LEFT: tl.constexpr):
    """sum_e V_e t_e + w_e b_e, or with LEFT V_e s_e, and the residual."""
    LP: tl.constexpr = P.PRECISION.LP
    SPLIT: tl.constexpr = P.PRECISION.SPLIT
    NI: tl.constexpr = 16 if LEFT and not SPLIT and side.NI < 16 else side.NI  # the inner size of a product
    c = tl.arange(0, NI)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, P.BT), tl.num_programs(0)):
        p, first, o_out, m_out = rows(tile, T, side.K, side, P)
        _, first_v, o_row, m_row = rows(tile, T, side.C, side, P)
        o_v, m_v = first_v + (o_row[:, None] + c), m_row[:, None] & (c < side.C)
        for b in tl.range(0, (side.K + P.BK - 1) // P.BK):
            u = block(b, P.BK)
            m = m_out[:, None] & (u < side.K)[None, :]
            total = turned(tl.zeros((P.BT * side.NP, P.BK), tl.float32), P)
            if P.DENSE:
                total = dense_sum(total, tile, u, V, W, scale, T, side, P, LEFT)
            for e in tl.range(0, 0 if P.DENSE else P.MIXED):
                v = tl.load(layer(V, e, T, side) + o_v, mask=m_v, other=0.0)
                if LEFT:
                    s = factor(own(W, 1, e, P), u[:, None], c, side.K, side, True)
                    total = add_turned(total, dz_operand(v, LP, SPLIT), s_operand(s, LP, SPLIT), P)
                else:
                    v = mixed_operand(v, p, weight_of(tile, e, MIX, T, per, side, P), side.N, LP)
                    t = t_operand(own(W, 6, e, P), own(B, 7, e, P), scale, u, side, LP)
                    total = add_turned(total, v, t, P)
            o = turned(total, P)
            if P.DENSE and B is not None:
                o = with_biases(o, tile, u, B, MIX, scale, T, per, side, P)
            if RESIDUAL is not None:
                o += tl.load(RESIDUAL + first + (o_out[:, None] + u[None, :]), mask=m, other=0.0).to(tl.float32)
            tl.store(OUT + first + (o_out[:, None] + u[None, :]), o.to(OUT.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T", "per"])
def mixed_expand(V, RESIDUAL, OUT, W, B, MIX, scale, T, per, P: tl.constexpr):
    """The output from V2, or dx from dZ."""
    if P.OPTIONS.IN_SIDE:
        expand(V, RESIDUAL, OUT, W, None, MIX, scale, T, per, P.IN, P, True)
    else:
        expand(V, RESIDUAL, OUT, W, B, MIX, scale, T, per, P.OUT, P, False)


@triton.jit
def with_bias(tile, G, B2, T, P: tl.constexpr):
    """<g, b2> in the rows of a tile."""
    p, first, o_g, m_g = rows(tile, T, P.OUT.K, P.OUT, P)
    total = tl.zeros((P.BT * P.OUT.NP,), tl.float32)
    for b in tl.range(0, (P.OUT.K + P.BK - 1) // P.BK):
        u = block(b, P.BK)
        m = m_g[:, None] & (u < P.OUT.K)[None, :]
        g = tl.load(G + first + (o_g[:, None] + u[None, :]), mask=m, other=0.0).to(tl.float32)
        total += tl.sum(g * tl.load(B2 + p[:, None] * P.OUT.K + u[None, :], mask=m, other=0.0).to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["T", "per"])
def mixed_tokens(
    X, G, Z, DV, DZ, V2, DW, A1, S1, T1, B1, A2, S2, T2, B2, MIX, scale, T, per, P: tl.constexpr
):  # fmt: skip
    """Z, w dV2, dZ and w V2 of each adapter and token, and DW [T, E].

    Offsets, weights and dV2 are computed again where needed: no registers are left to keep them.
    With a loop over adapters in one over tiles, the compiler would keep a pointer to each weight.
    """
    tiles = tl.cdiv(tl.cdiv(T, P.BT) - tl.program_id(0), tl.num_programs(0))
    for i in tl.range(0, tiles * P.MIXED):
        tile, e = tl.program_id(0) + i // P.MIXED * tl.num_programs(0), i % P.MIXED
        z = stream(tile, X, T, own(S1, 1, e, P), 1.0, P.IN, P, True)
        dv = stream(tile, G, T, own(T2, 6, e, P), scale, P.OUT, P, False)
        dv *= weight_of(tile, e, MIX, T, per, P.OUT, P)[:, None]
        if Z is not None:
            store_layer(Z, e, tile, z, T, P.IN, P)
            store_layer(DV, e, tile, dv, T, P.OUT, P)
        dz, v2 = middle_backward(
            z, dv, tile, T, own(A1, 0, e, P), own(T1, 2, e, P), own(B1, 3, e, P), own(A2, 4, e, P), own(S2, 5, e, P), P
        )  # fmt: skip
        later = tile + again(tile, T)
        store_layer(DZ, e, later, dz, T, P.IN, P)
        if V2 is not None:
            w = weight_of(later, e, MIX, T, per, P.OUT, P)
            store_layer(V2, e, later, v2 * w[:, None], T, P.OUT, P)
        if DW is not None:
            dw = tl.sum(v2 * stream(later, G, T, own(T2, 6, e, P), scale, P.OUT, P, False), 1)
            if B2 is not None:
                dw += with_bias(later, G, own(B2, 7, e, P), T, P) * scale
            token = later * P.BT + tl.arange(0, P.BT)
            dw = tl.sum(tl.reshape(dw, (P.BT, P.OUT.NP)), 1)
            tl.store(DW + token.to(tl.int64) * P.MIXED + e, dw, mask=token < T)


@triton.jit(do_not_specialize=["T"])
def mixed_sums(Z, DV, PART, A1, T1, B1, A2, S2, T, P: tl.constexpr):
    """`two_phase.sums` for each adapter, which has num_programs(1) / E programs and rows."""
    programs = tl.num_programs(1) // P.MIXED
    e, i = tl.program_id(1) // programs, tl.program_id(1) % programs
    row = PART + tl.program_id(1).to(tl.int64) * P.OFFSETS.ROW
    walk = (i, tl.cdiv(T, P.BT), programs)
    z, dv = layer(Z, e, T, P.IN), layer(DV, e, T, P.OUT)
    sum_tiles(
        walk, row, tl.program_id(0), z, dv, own(A1, 0, e, P), own(T1, 2, e, P), own(B1, 3, e, P),
        own(A2, 4, e, P), own(S2, 5, e, P), T, P,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "per"])
def mixed_columns(X, G, DZ, V2, PART, S1, MIX, scale, T, per, P: tl.constexpr):
    """`two_phase.columns` for each adapter, without dx."""
    N: tl.constexpr = P.IN.N if P.OPTIONS.IN_SIDE else P.OUT.N
    programs = tl.num_programs(1) // P.MIXED
    e, i = tl.program_id(1) // programs, tl.program_id(1) % programs
    row = PART + tl.program_id(1).to(tl.int64) * P.OFFSETS.ROW
    walk = (i, tl.cdiv(T.to(tl.int64) * N, P.BT).to(tl.int32), programs)
    dz, v2 = layer(DZ, e, T, P.IN), layer(V2, e, T, P.OUT)
    column_tiles(walk, row, tl.program_id(0), X, G, None, dz, v2, own(S1, 1, e, P), MIX + e, per, scale, T, P)
