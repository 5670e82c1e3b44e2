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
from compacter_kernels.impl.triton.middle import add_bias
from compacter_kernels.impl.triton.tiles import by_column, dot, mix, product


@triton.jit
def zero_sums(
    ACTIVATION: tl.constexpr, FOLD: tl.constexpr, BT: tl.constexpr, DP: tl.constexpr,
    NI1: tl.constexpr, NP1: tl.constexpr, NI2: tl.constexpr, NP2: tl.constexpr,
):  # fmt: skip
    """What `middle_backward` adds to: (dC1, dC2, dy), or (dA1, dA2, dt1, ds2, dy) where nothing is folded."""
    if ACTIVATION is None:
        if FOLD:
            sums = (tl.zeros((NP1 * NI1, NP1 * NI1), tl.float32),)
        else:
            sums = (tl.zeros((NI1, NP1, NP1), tl.float32),)
    elif FOLD:
        c1 = tl.zeros((NP1 * NI1, DP), tl.float32)
        c2 = tl.zeros((NP2 * NI2, DP), tl.float32)
        sums = (c1, c2, tl.zeros((BT, DP), tl.float32))
    else:
        a1 = tl.zeros((NI1, NP1, NP1), tl.float32)
        a2 = tl.zeros((NI2, NP2, NP2), tl.float32)
        t1 = tl.zeros((NI1, DP), tl.float32)
        s2 = tl.zeros((NI2, DP), tl.float32)
        sums = (a1, a2, t1, s2, tl.zeros((NP1, DP), tl.float32))
    return sums


@triton.jit
def add_rule(a, z, dv, BT: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr):
    """a + dA: dA[c, p, q] = sum_t Z[(t, p), c] dV[(t, q), c]."""
    return dot(tl.permute(by_column(z, BT, NP), (0, 2, 1)), by_column(dv, BT, NP), a, PRECISION)


@triton.jit
def middle_backward(
    z, dv2, sums, weights,
    N1: tl.constexpr, NI1: tl.constexpr, NP1: tl.constexpr, D1: tl.constexpr, E1: tl.constexpr,
    NI2: tl.constexpr, NP2: tl.constexpr,
    DP: tl.constexpr, ACTIVATION: tl.constexpr, FOLD: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z [BT * NP1, NI1] and dV2 [BT * NP2, NI2] -> dZ, V2 in the same shapes, and the sums with this tile added."""
    if ACTIVATION is None:
        a = weights[0]
        if FOLD:
            zj = tl.reshape(z, (BT, NP1 * NI1))
            dvj = tl.reshape(dv2, (BT, NP2 * NI2))
            v2 = tl.reshape(product(zj, a, PRECISION), (BT * NP2, NI2))
            dz = tl.reshape(product(dvj, tl.trans(a), PRECISION), (BT * NP1, NI1))
            sums = (dot(tl.trans(zj), dvj, sums[0], PRECISION),)
        else:
            v2 = mix(z, a, BT, NP1, PRECISION)
            dz = mix(dv2, tl.permute(a, (0, 2, 1)), BT, NP1, PRECISION)
            sums = (add_rule(sums[0], z, dv2, BT, NP1, PRECISION),)
    elif FOLD:
        c1, c2, b1 = weights
        e = tl.arange(0, DP)
        m = ((e // E1 < N1) & (e % E1 < D1))[None, :]
        zj = tl.reshape(z, (BT, NP1 * NI1))
        dvj = tl.reshape(dv2, (BT, NP2 * NI2))
        y = product(zj, c1, PRECISION) + b1[None, :]
        h = tl.where(m, activate(y, ACTIVATION), 0.0)
        dy = tl.where(m, product(dvj, c2, PRECISION) * derivative(y, ACTIVATION), 0.0)
        v2 = tl.reshape(product(h, tl.trans(c2), PRECISION), (BT * NP2, NI2))
        dz = tl.reshape(product(dy, tl.trans(c1), PRECISION), (BT * NP1, NI1))
        sum1 = dot(tl.trans(zj), dy, sums[0], PRECISION)
        sum2 = dot(tl.trans(dvj), h, sums[1], PRECISION)
        sums = (sum1, sum2, sums[2] + dy)
    else:
        a1, a2, t1, s2, b1 = weights
        p = tl.arange(0, BT * NP1) % NP1
        m = (p < N1)[:, None] & (tl.arange(0, DP) < D1)[None, :]
        v1 = mix(z, a1, BT, NP1, PRECISION)
        y = add_bias(product(v1, t1, PRECISION), b1, BT)
        h = tl.where(m, activate(y, ACTIVATION), 0.0)
        dz2 = mix(dv2, tl.permute(a2, (0, 2, 1)), BT, NP2, PRECISION)
        dy = tl.where(m, product(dz2, s2, PRECISION) * derivative(y, ACTIVATION), 0.0)
        z2 = product(h, tl.trans(s2), PRECISION)
        v2 = mix(z2, a2, BT, NP2, PRECISION)
        dv = product(dy, tl.trans(t1), PRECISION)
        dz = mix(dv, tl.permute(a1, (0, 2, 1)), BT, NP1, PRECISION)
        sum_a1 = add_rule(sums[0], z, dv, BT, NP1, PRECISION)
        sum_a2 = add_rule(sums[1], z2, dv2, BT, NP2, PRECISION)
        sum_t1 = dot(tl.trans(v1), dy, sums[2], PRECISION)
        sum_s2 = dot(tl.trans(dz2), h, sums[3], PRECISION)
        sums = (sum_a1, sum_a2, sum_t1, sum_s2, sums[4] + tl.sum(tl.reshape(dy, (BT, NP1, DP)), 0))
    return dz, v2, sums
