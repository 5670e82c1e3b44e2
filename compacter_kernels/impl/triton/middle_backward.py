"""The middle and its derivative: Z, dV2 -> dZ, V2, and the sums for the small gradients.

    dZ2[p, i] = sum_q A2_i[p, q] dV2[q, i]      dA2_i[p, q] = sum_tok Z2[p, i] dV2[q, i]
    dh[p, v]  = sum_i s2_i[v] dZ2[p, i]         ds2_i[v] = sum_{tok, p} h[p, v] dZ2[p, i]
    dy        = dh act'(y), h = act(y)          db1 = sum_tok dy
    dV[q, i]  = sum_v dy[q, v] t1_i[v]          dt1_i[v] = sum_{tok, q} V[q, i] dy[q, v]
    dZ[p, i]  = sum_q A1_i[p, q] dV[q, i]       dA1_i[p, q] = sum_tok Z[p, i] dV[q, i]

With FOLD, C1[(p, i), (q, v)] = A1_i[p, q] t1_i[v] and C2[(q, i), (p, v)] = A2_i[p, q] s2_i[v]. The
kernels sum dC1 = Z^T dy and dC2 = dV2^T h; partials.py sums these over v, or over p and q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.functions import activate, derivative
from compacter_kernels.impl.triton.middle import (
    again,
    blocks,
    dense_bottleneck,
    folded_rule,
    folded_weights,
    inside,
    into_bottleneck,
    left_factor,
    once,
    right_factor,
    unpadded,
)
from compacter_kernels.impl.triton.tiles import add_product, by_column, dot, dot_apart, mix, product, unfolded


@triton.jit
def block_gradients(b, zj, dvj, weights, turns, P: tl.constexpr):
    """h and dy of block b of a folded bottleneck, [BT, EB]. turns: see `dot_apart`."""
    c1, c2, b1 = weights
    m = inside(b * P.EB + tl.arange(0, P.EB), P.IN)[None, :]
    nothing = tl.zeros((P.BT, P.EB), tl.float32)
    y = dot_apart(zj, c1, nothing, turns, P.PRECISION.MIDDLE) + b1[None, :]
    h = tl.where(m, activate(y, P.ACTIVATION), 0.0)
    dh = dot_apart(dvj, c2, nothing, turns, P.PRECISION.MIDDLE)
    return h, tl.where(m, dh * derivative(y, P.ACTIVATION), 0.0)


@triton.jit
def through_block(dz, v2, h, dy, weights, P: tl.constexpr):
    """dz and v2 + the contributions of a block of the bottleneck."""
    dz = dot(dy, tl.trans(weights[0]), dz, P.PRECISION.BEYOND)
    v2 = dot(h, tl.trans(weights[1]), v2, P.PRECISION.BEYOND)
    return dz, v2


@triton.jit
def middle_backward(z, dv2, tile, T, A1, T1, B1, A2, S2, P: tl.constexpr):
    """Z, dV2 [BT * NP, NI] -> dZ, V2 of the same shapes, float32."""
    PRECISION: tl.constexpr = P.PRECISION.MIDDLE
    zero = again(tile, T)
    if P.DENSE:
        y, v2 = dense_bottleneck(z, B1, P)
        dz = dv2 * derivative(y, P.ACTIVATION)
    elif P.FOLD:
        zj = tl.reshape(z, (P.BT, P.IN.NP * P.IN.NI))
        dvj = tl.reshape(dv2, (P.BT, P.OUT.NP * P.OUT.NI))
        v2 = tl.zeros((P.BT, P.OUT.NP * P.OUT.NI), tl.float32)
        dz = tl.zeros((P.BT, P.IN.NP * P.IN.NI), tl.float32)
        if P.ACTIVATION is None:
            a = folded_rule(A1 + zero, P.IN)
            v2 = dot_apart(zj, a, v2, once(T), PRECISION)
            dz = dot_apart(dvj, tl.trans(a), dz, once(T), PRECISION)
        else:
            for b in tl.range(0, blocks(T, P)):
                weights = folded_weights(b, A1, T1, B1, A2, S2, P)
                h, dy = block_gradients(b, zj, dvj, weights, 1, P)
                dz, v2 = through_block(dz, v2, h, dy, weights, P)
        dz = tl.reshape(dz, (P.BT * P.IN.NP, P.IN.NI))
        v2 = tl.reshape(v2, (P.BT * P.OUT.NP, P.OUT.NI))
    elif P.ACTIVATION is None:
        a = unfolded(A1 + zero, P.IN, False)
        v2 = mix(z, a, P.IN, P)
        dz = mix(dv2, tl.permute(a, (0, 2, 1)), P.OUT, P)
    else:
        m = unpadded(P)
        _, y = into_bottleneck(z, A1 + zero, T1 + zero, B1, P)
        h = tl.where(m, activate(y, P.ACTIVATION), 0.0)
        z2 = product(h, tl.trans(left_factor(S2 + zero, P)), PRECISION)
        v2 = mix(z2, unfolded(A2 + zero, P.OUT, False), P.OUT, P)
        dz2 = mix(dv2, unfolded(A2 + 2 * zero, P.OUT, True), P.OUT, P)
        dh = product(dz2, left_factor(S2 + 2 * zero, P), PRECISION)
        dy = tl.where(m, dh * derivative(y, P.ACTIVATION), 0.0)
        dv = product(dy, tl.trans(right_factor(T1 + 2 * zero, P)), PRECISION)
        dz = mix(dv, unfolded(A1 + 2 * zero, P.IN, True), P.IN, P)
    return dz, v2


@triton.jit
def folded_sums(sums, zj, dvj, h, dy, turns, P: tl.constexpr):
    """The sums (dC1, dC2, db1) of a block with the share of a tile added."""
    d_c2 = add_product(sums[1], tl.trans(dvj), h, turns, P.PRECISION.SUMS)
    d_c1 = add_product(sums[0], tl.trans(zj), dy, turns, P.PRECISION.SUMS)
    return d_c1, d_c2, sums[2] + tl.sum(dy, 0, keep_dims=True)


@triton.jit
def zero_folded_sums(P: tl.constexpr):
    """The initial sums of a block, (dC1, dC2, db1), or of the one folded rule."""
    if P.ACTIVATION is None:
        return (tl.zeros((P.IN.NP * P.IN.NI, P.OUT.NP * P.OUT.NI), tl.float32),)
    else:
        c1 = tl.zeros((P.IN.NP * P.IN.NI, P.EB), tl.float32)
        c2 = tl.zeros((P.OUT.NP * P.OUT.NI, P.EB), tl.float32)
        return c1, c2, tl.zeros((1, P.EB), tl.float32)


@triton.jit
def held_backward(z, dv2, sums, held, P: tl.constexpr):
    """`middle_backward` with folded weights in registers, and the sums with this tile's share."""
    PRECISION: tl.constexpr = P.PRECISION.MIDDLE
    zj = tl.reshape(z, (P.BT, P.IN.NP * P.IN.NI))
    dvj = tl.reshape(dv2, (P.BT, P.OUT.NP * P.OUT.NI))
    if P.ACTIVATION is None:
        v2 = product(zj, held[0], PRECISION)
        dz = product(dvj, tl.trans(held[0]), PRECISION)
        added = (add_product(sums[0], tl.trans(zj), dvj, 1, P.PRECISION.SUMS),)
    else:
        v2 = tl.zeros((P.BT, P.OUT.NP * P.OUT.NI), tl.float32)
        dz = tl.zeros((P.BT, P.IN.NP * P.IN.NI), tl.float32)
        added = ()
        for b in tl.static_range(P.DP // P.EB):
            weights = (held[3 * b], held[3 * b + 1], held[3 * b + 2])
            here = (sums[3 * b], sums[3 * b + 1], sums[3 * b + 2])
            h, dy = block_gradients(b, zj, dvj, weights, 1, P)
            dz, v2 = through_block(dz, v2, h, dy, weights, P)
            added = added + folded_sums(here, zj, dvj, h, dy, 1, P)
    return tl.reshape(dz, (P.BT * P.IN.NP, P.IN.NI)), tl.reshape(v2, (P.BT * P.OUT.NP, P.OUT.NI)), added


@triton.jit
def add_rule(a, z, dv, side: tl.constexpr, other: tl.constexpr, P: tl.constexpr):
    """a + dA: dA[c, p, q] = sum_t Z[(t, p), c] dV[(t, q), c]."""
    zt = tl.permute(by_column(z, side, P), (0, 2, 1))
    return add_product(a, zt, by_column(dv, other, P), 1, P.PRECISION.SUMS)


@triton.jit
def add_factor(total, v, dy, P: tl.constexpr):
    """total + V^T dy by chunks, [NP, NI, DP]. Every warp would repeat one product over all rows."""
    vt = tl.permute(tl.reshape(v, (P.BT, P.IN.NP, v.shape[1])), (1, 2, 0))
    dy = tl.permute(tl.reshape(dy, (P.BT, P.IN.NP, P.DP)), (1, 0, 2))
    return add_product(total, vt, dy, 1, P.PRECISION.SUMS)


@triton.jit
def zero_unfolded_sums(side: tl.constexpr, P: tl.constexpr):
    """The initial sums of `in_sums` and `out_sums`: gradients of rule, factor by chunks, b1."""
    a = tl.zeros((side.NI, side.NP, side.NP), tl.float32)
    w = tl.zeros((side.NP, side.NI, P.DP), tl.float32)
    return a, w, tl.zeros((P.IN.NP, P.DP), tl.float32)


@triton.jit
def in_sums(sums, z, dv2, zero, A1, T1, B1, A2, S2, P: tl.constexpr):
    """dA1, dt1 and db1 with a tile's share added, not folded. z, dv2: pointers and mask."""
    dz2 = mix(tl.load(dv2[0], mask=dv2[1], other=0.0), unfolded(A2 + zero, P.OUT, True), P.OUT, P)
    dh = product(dz2, left_factor(S2 + zero, P), P.PRECISION.MIDDLE)
    v1, y = into_bottleneck(tl.load(z[0], mask=z[1], other=0.0), A1 + zero, T1 + zero, B1, P)
    dy = tl.where(unpadded(P), dh * derivative(y, P.ACTIVATION), 0.0)
    d_t1 = add_factor(sums[1], v1, dy, P)
    d_b1 = sums[2] + tl.sum(tl.reshape(dy, (P.BT, P.IN.NP, P.DP)), 0)
    dv = product(dy, tl.trans(right_factor(T1 + 2 * zero, P)), P.PRECISION.MIDDLE)
    d_a1 = add_rule(sums[0], tl.load(z[0] + zero, mask=z[1], other=0.0), dv, P.IN, P.IN, P)
    return d_a1, d_t1, d_b1


@triton.jit
def out_sums(sums, z, dv2, zero, A1, T1, B1, A2, S2, P: tl.constexpr):
    """dA2 and ds2 in the same way."""
    _, y = into_bottleneck(tl.load(z[0], mask=z[1], other=0.0), A1 + zero, T1 + zero, B1, P)
    h = tl.where(unpadded(P), activate(y, P.ACTIVATION), 0.0)
    z2 = product(h, tl.trans(left_factor(S2 + zero, P)), P.PRECISION.MIDDLE)
    d_a2 = add_rule(sums[0], z2, tl.load(dv2[0], mask=dv2[1], other=0.0), P.OUT, P.OUT, P)
    dz2 = mix(tl.load(dv2[0] + zero, mask=dv2[1], other=0.0), unfolded(A2 + zero, P.OUT, True), P.OUT, P)
    return d_a2, add_factor(sums[1], dz2, h, P), sums[2]
