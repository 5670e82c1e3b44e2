"""From Z to V2, the n^2 r numbers of a token between x and the output.

FOLD: the rule is folded into the factor beside it, two products of [BT, n^2 r] with one small matrix each (n <= 8).
Otherwise the mixes by the rule stay apart, n^3 r operations each (n = 12).
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.functions import activate
from compacter_kernels.impl.triton.tiles import factor, folded, mix, product, unfolded


@triton.jit
def folded_rule(A, j, N: tl.constexpr, R: tl.constexpr, NI: tl.constexpr):
    """A_i[p, q] at ((p, c), (q, c)), 0 elsewhere: [J, J] float32."""
    p = (j // NI)[:, None]
    q = (j // NI)[None, :]
    c = (j % NI)[:, None]
    m = (p < N) & (q < N) & (c < N * R) & ((j % NI)[None, :] == c)
    return tl.load(A + (c // R) * (N * N) + p * N + q, mask=m, other=0.0).to(tl.float32)


@triton.jit
def middle_weights(
    A1, T1, B1, A2, S2,
    N1: tl.constexpr, R1: tl.constexpr, NI1: tl.constexpr, NP1: tl.constexpr, D1: tl.constexpr, E1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, NI2: tl.constexpr, NP2: tl.constexpr, D2: tl.constexpr, E2: tl.constexpr,
    DP: tl.constexpr, ACTIVATION: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """What `middle` multiplies with, float32: linear (A1,), folded (C1, C2, b1), else (A1, A2, t1, s2, b1)."""
    if ACTIVATION is None:
        if FOLD:
            found = (folded_rule(A1, tl.arange(0, NP1 * NI1), N1, R1, NI1),)
        else:
            found = (unfolded(A1, N1, NP1, N1 * R1, NI1, R1),)
    elif FOLD:
        c1 = folded(A1, T1, N1, NP1, R1, NI1, D1, E1, DP, False)
        c2 = folded(A2, S2, N2, NP2, R2, NI2, D2, E2, DP, True)
        if B1 is not None:
            e = tl.arange(0, DP)
            m = (e // E1 < N1) & (e % E1 < D1)
            b1 = tl.load(B1 + e // E1 * D1 + e % E1, mask=m, other=0.0).to(tl.float32)
        else:
            b1 = tl.zeros((DP,), tl.float32)
        found = (c1, c2, b1)
    else:
        v = tl.arange(0, DP)
        p = tl.arange(0, NP1)
        a1 = unfolded(A1, N1, NP1, N1 * R1, NI1, R1)
        a2 = unfolded(A2, N2, NP2, N2 * R2, NI2, R2)
        t1 = factor(T1, v[None, :], tl.arange(0, NI1)[:, None], D1, N1 * R1, R1, False)
        s2 = factor(S2, v[None, :], tl.arange(0, NI2)[:, None], D2, N2 * R2, R2, True)
        if B1 is not None:
            m = (p < N1)[:, None] & (v < D1)[None, :]
            b1 = tl.load(B1 + p[:, None] * D1 + v[None, :], mask=m, other=0.0).to(tl.float32)
        else:
            b1 = tl.zeros((NP1, DP), tl.float32)
        found = (a1, a2, t1, s2, b1)
    return found


@triton.jit
def add_bias(y, b1, BT: tl.constexpr):
    """y [BT * NP, DP] + b1 [NP, DP] of each token."""
    y3 = tl.reshape(y, (BT, b1.shape[0], b1.shape[1])) + b1[None, :, :]
    return tl.reshape(y3, (BT * b1.shape[0], b1.shape[1]))


@triton.jit
def middle(
    z, weights,
    N1: tl.constexpr, NI1: tl.constexpr, NP1: tl.constexpr, D1: tl.constexpr, E1: tl.constexpr,
    N2: tl.constexpr, NI2: tl.constexpr, NP2: tl.constexpr, D2: tl.constexpr, E2: tl.constexpr,
    DP: tl.constexpr, ACTIVATION: tl.constexpr, FOLD: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z [BT * NP1, NI1] -> V2 [BT * NP2, NI2], float32. ACTIVATION is None for a projection alone."""
    if ACTIVATION is None:
        if FOLD:
            v2 = tl.reshape(product(tl.reshape(z, (BT, NP1 * NI1)), weights[0], PRECISION), (BT * NP2, NI2))
        else:
            v2 = mix(z, weights[0], BT, NP1, PRECISION)
    elif FOLD:
        c1, c2, b1 = weights
        e = tl.arange(0, DP)
        y = product(tl.reshape(z, (BT, NP1 * NI1)), c1, PRECISION) + b1[None, :]
        h = tl.where(((e // E1 < N1) & (e % E1 < D1))[None, :], activate(y, ACTIVATION), 0.0)
        v2 = tl.reshape(product(h, tl.trans(c2), PRECISION), (BT * NP2, NI2))
    else:
        a1, a2, t1, s2, b1 = weights
        p = tl.arange(0, BT * NP1) % NP1
        m = (p < N1)[:, None] & (tl.arange(0, DP) < D1)[None, :]
        y = add_bias(product(mix(z, a1, BT, NP1, PRECISION), t1, PRECISION), b1, BT)
        h = tl.where(m, activate(y, ACTIVATION), 0.0)
        v2 = mix(product(h, tl.trans(s2), PRECISION), a2, BT, NP2, PRECISION)
    return v2
