"""The middle again, and its derivative: from Z and dV2 to dZ and V2, and the sums over tokens for the small gradients.

    y = V t1 + b1, h = act(y), as forward
    dZ2[p, i] = sum_q A2_i[p, q] dV2[q, i]      dA2_i[p, q] = sum_tok Z2[p, i] dV2[q, i]
    dh[p, v]  = sum_i s2_i[v] dZ2[p, i]         ds2_i[v] = sum_{tok, p} h[p, v] dZ2[p, i],   dy = dh act'(y)
    dV[q, i]  = sum_v dy[q, v] t1_i[v]          dt1_i[v] = sum_{tok, q} V[q, i] dy[q, v],    db1 = sum_tok dy
    dZ[p, i]  = sum_q A1_i[p, q] dV[q, i]       dA1_i[p, q] = sum_tok Z[p, i] dV[q, i]

Folded, with C1[(p, i), (q, v)] = A1_i[p, q] t1_i[v] and C2[(q, i), (p, v)] = A2_i[p, q] s2_i[v], what is summed is
dC1 = Z^T dy and dC2 = dV2^T h; `partials` then sums those over v or over p and q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.functions import activate, derivative
from compacter_kernels.impl.triton.middle import add_bias, block_weights, inside, unpadded, whole_weights
from compacter_kernels.impl.triton.tiles import by_column, dot, mix, product


@triton.jit
def zero_sums(P: tl.constexpr):
    """What `middle_backward` adds to: (dC1, dC2, db1) of each block, or (dA1, dA2, dt1, ds2, db1) where nothing is folded."""
    if P.ACTIVATION is None:
        if P.FOLD:
            sums = (tl.zeros((P.IN.NP * P.IN.NI, P.IN.NP * P.IN.NI), tl.float32),)
        else:
            sums = (tl.zeros((P.IN.NI, P.IN.NP, P.IN.NP), tl.float32),)
    elif P.FOLD:
        sums = ()
        for _ in tl.static_range(P.DP // P.EB):
            c1 = tl.zeros((P.IN.NP * P.IN.NI, P.EB), tl.float32)
            c2 = tl.zeros((P.OUT.NP * P.OUT.NI, P.EB), tl.float32)
            if P.KEEP:  # by tokens, which are added up once at the end
                sums = sums + (c1, c2, tl.zeros((P.BT, P.EB), tl.float32))
            else:
                sums = sums + (c1, c2, tl.zeros((1, P.EB), tl.float32))
    else:
        a1 = tl.zeros((P.IN.NI, P.IN.NP, P.IN.NP), tl.float32)
        a2 = tl.zeros((P.OUT.NI, P.OUT.NP, P.OUT.NP), tl.float32)
        t1 = tl.zeros((P.IN.NI, P.DP), tl.float32)
        s2 = tl.zeros((P.OUT.NI, P.DP), tl.float32)
        sums = (a1, a2, t1, s2, tl.zeros((P.IN.NP, P.DP), tl.float32))
    return sums


@triton.jit
def add_rule(a, z, dv, side: tl.constexpr, P: tl.constexpr):
    """a + dA: dA[c, p, q] = sum_t Z[(t, p), c] dV[(t, q), c]."""
    zt = tl.permute(by_column(z, side, P), (0, 2, 1))
    return dot(zt, by_column(dv, side, P), a, P.PRECISION.MIDDLE)


@triton.jit
def projection_backward(z, dv2, sums, a, P: tl.constexpr):
    """`middle_backward` of a projection alone, whose rule is a."""
    PRECISION: tl.constexpr = P.PRECISION.MIDDLE
    if P.FOLD:
        zj = tl.reshape(z, (P.BT, P.IN.NP * P.IN.NI))
        dvj = tl.reshape(dv2, (P.BT, P.OUT.NP * P.OUT.NI))
        v2 = tl.reshape(product(zj, a, PRECISION), (P.BT * P.OUT.NP, P.OUT.NI))
        dz = tl.reshape(product(dvj, tl.trans(a), PRECISION), (P.BT * P.IN.NP, P.IN.NI))
        sums = (dot(tl.trans(zj), dvj, sums[0], PRECISION),)
    else:
        v2 = mix(z, a, P.IN, P)
        dz = mix(dv2, tl.permute(a, (0, 2, 1)), P.IN, P)
        sums = (add_rule(sums[0], z, dv2, P.IN, P),)
    return dz, v2, sums


@triton.jit
def folded_backward(z, dv2, sums, kept, zero, A1, T1, B1, A2, S2, P: tl.constexpr):
    """`middle_backward` with folded rules, a block of the bottleneck at a time."""
    PRECISION: tl.constexpr = P.PRECISION.MIDDLE
    zj = tl.reshape(z, (P.BT, P.IN.NP * P.IN.NI))
    dvj = tl.reshape(dv2, (P.BT, P.OUT.NP * P.OUT.NI))
    v2 = tl.zeros((P.BT, P.OUT.NP * P.OUT.NI), tl.float32)
    dz = tl.zeros((P.BT, P.IN.NP * P.IN.NI), tl.float32)
    added = ()
    for b in tl.static_range(P.DP // P.EB):
        c1, c2, b1 = block_weights(b, kept, zero, A1, T1, B1, A2, S2, P)
        m = inside(b * P.EB + tl.arange(0, P.EB), P.IN)[None, :]
        y = product(zj, c1, PRECISION) + b1[None, :]
        h = tl.where(m, activate(y, P.ACTIVATION), 0.0)
        dy = tl.where(m, product(dvj, c2, PRECISION) * derivative(y, P.ACTIVATION), 0.0)
        v2 = dot(h, tl.trans(c2), v2, PRECISION)
        dz = dot(dy, tl.trans(c1), dz, PRECISION)
        d_c1 = dot(tl.trans(zj), dy, sums[3 * b], PRECISION)
        d_c2 = dot(tl.trans(dvj), h, sums[3 * b + 1], PRECISION)
        if not P.KEEP:
            dy = tl.sum(dy, 0, keep_dims=True)
        added = added + (d_c1, d_c2, sums[3 * b + 2] + dy)
    return tl.reshape(dz, (P.BT * P.IN.NP, P.IN.NI)), tl.reshape(v2, (P.BT * P.OUT.NP, P.OUT.NI)), added


@triton.jit
def unfolded_backward(z, dv2, sums, weights, P: tl.constexpr):
    """`middle_backward` with the mixes apart."""
    PRECISION: tl.constexpr = P.PRECISION.MIDDLE
    a1, a2, t1, s2, b1 = weights
    m = unpadded(P)
    v1 = mix(z, a1, P.IN, P)
    y = add_bias(product(v1, t1, PRECISION), b1, P)
    h = tl.where(m, activate(y, P.ACTIVATION), 0.0)
    dz2 = mix(dv2, tl.permute(a2, (0, 2, 1)), P.OUT, P)
    dy = tl.where(m, product(dz2, s2, PRECISION) * derivative(y, P.ACTIVATION), 0.0)
    z2 = product(h, tl.trans(s2), PRECISION)
    v2 = mix(z2, a2, P.OUT, P)
    dv = product(dy, tl.trans(t1), PRECISION)
    dz = mix(dv, tl.permute(a1, (0, 2, 1)), P.IN, P)
    d_a1 = add_rule(sums[0], z, dv, P.IN, P)
    d_a2 = add_rule(sums[1], z2, dv2, P.OUT, P)
    d_t1 = dot(tl.trans(v1), dy, sums[2], PRECISION)
    d_s2 = dot(tl.trans(dz2), h, sums[3], PRECISION)
    d_b1 = sums[4] + tl.sum(tl.reshape(dy, (P.BT, P.IN.NP, P.DP)), 0)
    return dz, v2, (d_a1, d_a2, d_t1, d_s2, d_b1)


@triton.jit
def middle_backward(z, dv2, sums, kept, zero, A1, T1, B1, A2, S2, P: tl.constexpr):
    """Z, dV2 [BT * NP, NI] -> dZ, V2 of the same shapes, float32, and the sums with this tile's share added."""
    if P.ACTIVATION is None:
        a = whole_weights(kept, zero, A1, T1, B1, A2, S2, P)[0]
        return projection_backward(z, dv2, sums, a, P)
    elif P.FOLD:
        return folded_backward(z, dv2, sums, kept, zero, A1, T1, B1, A2, S2, P)
    else:
        weights = whole_weights(kept, zero, A1, T1, B1, A2, S2, P)
        return unfolded_backward(z, dv2, sums, weights, P)
