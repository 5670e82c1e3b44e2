"""One row of partial gradients for each program: where each gradient lies in it, and how the sums are written there.

A row holds left1, right2, bias2, rule1, right1, bias1, rule2, left2, each laid out like its parameter; a rule r times,
once for each rank index. `reduce.py` sums the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.tiles import factor, product


@triton.jit
def store_left(P, d, u, c, K: tl.constexpr, I: tl.constexpr, R: tl.constexpr):
    """d [., .] at (u, c), broadcast, as left (n, K, r)."""
    tl.store(P + (c // R) * (K * R) + u * R + c % R, d, mask=(u < K) & (c < I))


@triton.jit
def store_right(P, d, u, c, K: tl.constexpr, I: tl.constexpr):
    """d at (u, c), broadcast, as right (n, r, K)."""
    tl.store(P + c * K + u, d, mask=(u < K) & (c < I))


@triton.jit
def store_rule(P, d, c, p, q, N: tl.constexpr, R: tl.constexpr):
    """d at (c, p, q), broadcast, as r rules (n, n, n)."""
    o_rule = (c % R) * (N * N * N) + (c // R) * (N * N) + p * N + q
    tl.store(P + o_rule, d, mask=(c < N * R) & (p < N) & (q < N))


@triton.jit
def store_folded(
    P_RULE, P_FACTOR, d, A, W, NP: tl.constexpr, NI: tl.constexpr, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, LEFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC [J, DP] as the gradients of the rule and of the factor that were folded.

    down: dA_i[p, q] = sum_v dC[(p, i), (q, v)] t_i[v],    dt_i[v] = sum_{p, q} dC[(p, i), (q, v)] A_i[p, q];
    up (LEFT) has (q, i), (p, v) and s instead. The sums over a part of e are products with a one-hot matrix.
    """
    NQ: tl.constexpr = NP if NP > 16 else 16
    NV: tl.constexpr = DP
    j = tl.arange(0, NP * NI)[:, None]
    e = tl.arange(0, DP)
    c = j % NI
    outer = j // NI
    w = factor(W, (e % D)[None, :], c, D, N * R, R, LEFT)
    q = tl.arange(0, NQ)
    onehot = ((e // D)[:, None] == q[None, :]).to(tl.float32)
    d_rule = product(d * w, onehot, PRECISION)
    if LEFT:
        store_rule(P_RULE, d_rule, c, q[None, :], outer, N, R)
        o_rule = (c // R) * (N * N) + (e // D)[None, :] * N + outer
    else:
        store_rule(P_RULE, d_rule, c, outer, q[None, :], N, R)
        o_rule = (c // R) * (N * N) + outer * N + (e // D)[None, :]
    m = (outer < N) & (c < N * R) & (e < N * D)[None, :]
    a = tl.load(A + o_rule, mask=m, other=0.0).to(tl.float32)
    v = tl.arange(0, NV)
    onehot = ((e % D)[:, None] == v[None, :]).to(tl.float32)
    d_factor = tl.sum(tl.reshape(product(d * a, onehot, PRECISION), (NP, NI, NV)), 0)
    c = tl.arange(0, NI)[:, None]
    if LEFT:
        store_left(P_FACTOR, d_factor, v[None, :], c, D, N * R, R)
    else:
        store_right(P_FACTOR, d_factor, v[None, :], c, D, N * R)


@triton.jit
def store_sums(
    PART, sums, A1, T1, A2, S2,
    O_A1: tl.constexpr, O_T1: tl.constexpr, O_B1: tl.constexpr, O_A2: tl.constexpr, O_S2: tl.constexpr,
    N1: tl.constexpr, R1: tl.constexpr, NI1: tl.constexpr, NP1: tl.constexpr, D1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, NI2: tl.constexpr, NP2: tl.constexpr, D2: tl.constexpr,
    DP: tl.constexpr, ACTIVATION: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of `middle_backward` into this program's row, at the given offsets."""
    if ACTIVATION is None:
        if FOLD:
            j = tl.arange(0, NP1 * NI1)
            same = (j % NI1)[:, None] == (j % NI1)[None, :]
            o_rule = ((j % NI1) % R1 * N1 + (j % NI1) // R1)[:, None] * (N1 * N1)
            o_rule += (j // NI1)[:, None] * N1 + (j // NI1)[None, :]
            inside = (j // NI1 < N1) & (j % NI1 < N1 * R1)
            tl.store(PART + O_A1 + o_rule, sums[0], mask=same & inside[:, None] & inside[None, :])
        else:
            c = tl.arange(0, NI1)[:, None, None]
            p = tl.arange(0, NP1)
            store_rule(PART + O_A1, sums[0], c, p[None, :, None], p[None, None, :], N1, R1)
    elif FOLD:
        store_folded(PART + O_A1, PART + O_T1, sums[0], A1, T1, NP1, NI1, N1, R1, D1, DP, False, PRECISION)
        store_folded(PART + O_A2, PART + O_S2, sums[1], A2, S2, NP2, NI2, N2, R2, D2, DP, True, PRECISION)
        e = tl.arange(0, DP)
        tl.store(PART + O_B1 + e, tl.sum(sums[2], 0), mask=e < N1 * D1)
    else:
        p = tl.arange(0, NP1)
        v = tl.arange(0, DP)
        c1 = tl.arange(0, NI1)
        c2 = tl.arange(0, NI2)
        store_rule(PART + O_A1, sums[0], c1[:, None, None], p[None, :, None], p[None, None, :], N1, R1)
        store_rule(PART + O_A2, sums[1], c2[:, None, None], p[None, :, None], p[None, None, :], N2, R2)
        store_right(PART + O_T1, sums[2], v[None, :], c1[:, None], D1, N1 * R1)
        store_left(PART + O_S2, sums[3], v[None, :], c2[:, None], D2, N2 * R2, R2)
        o_bias = p[:, None] * D1 + v[None, :]
        tl.store(PART + O_B1 + o_bias, sums[4], mask=(p < N1)[:, None] & (v < D1)[None, :])
