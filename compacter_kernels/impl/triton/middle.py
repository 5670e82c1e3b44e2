"""From Z to V2, the n^2 r numbers of a token between x and the output, and back.

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
def middle(
    z, A1, T1, B1, A2, S2,
    N1: tl.constexpr, R1: tl.constexpr, NI1: tl.constexpr, NP1: tl.constexpr, D1: tl.constexpr, E1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, NI2: tl.constexpr, NP2: tl.constexpr, D2: tl.constexpr, E2: tl.constexpr,
    DP: tl.constexpr, ACTIVATION: tl.constexpr, FOLD: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z [BT * NP1, NI1] -> V2 [BT * NP2, NI2], float32. ACTIVATION is None for a projection alone."""
    if ACTIVATION is None:
        if FOLD:
            j = tl.arange(0, NP1 * NI1)
            v = product(tl.reshape(z, (BT, NP1 * NI1)), folded_rule(A1, j, N1, R1, NI1), PRECISION)
            v2 = tl.reshape(v, (BT * NP2, NI2))
        else:
            v2 = mix(z, unfolded(A1, N1, NP1, N1 * R1, NI1, R1), BT, NP1, PRECISION)
    elif FOLD:
        e = tl.arange(0, DP)
        m = (e // E1 < N1) & (e % E1 < D1)
        c1 = folded(A1, T1, N1, NP1, R1, NI1, D1, E1, DP, False)
        c2 = folded(A2, S2, N2, NP2, R2, NI2, D2, E2, DP, True)
        y = product(tl.reshape(z, (BT, NP1 * NI1)), c1, PRECISION)
        if B1 is not None:
            y += tl.load(B1 + e // E1 * D1 + e % E1, mask=m, other=0.0).to(tl.float32)[None, :]
        h = tl.where(m[None, :], activate(y, ACTIVATION), 0.0)
        v2 = tl.reshape(product(h, tl.trans(c2), PRECISION), (BT * NP2, NI2))
    else:
        p = tl.arange(0, BT * NP1) % NP1
        v = tl.arange(0, DP)
        i1 = tl.arange(0, NI1)
        i2 = tl.arange(0, NI2)
        m = (p < N1)[:, None] & (v < D1)[None, :]
        a1 = unfolded(A1, N1, NP1, N1 * R1, NI1, R1)
        t1 = factor(T1, v[None, :], i1[:, None], D1, N1 * R1, R1, False)
        y = product(mix(z, a1, BT, NP1, PRECISION), t1, PRECISION)
        if B1 is not None:
            y += tl.load(B1 + p[:, None] * D1 + v[None, :], mask=m, other=0.0).to(tl.float32)
        h = tl.where(m, activate(y, ACTIVATION), 0.0)
        s2 = factor(S2, v[:, None], i2[None, :], D2, N2 * R2, R2, True)
        a2 = unfolded(A2, N2, NP2, N2 * R2, NI2, R2)
        v2 = mix(product(h, s2, PRECISION), a2, BT, NP2, PRECISION)
    return v2
