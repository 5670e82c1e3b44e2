"""One row of partial gradients for each program: where each gradient lies in it, and how the sums are written there.

A row holds left1, right2, bias2, rule1, right1, bias1, rule2, left2, each laid out like its parameter; a rule r times,
once for each rank index. `reduce.py` sums the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.tiles import factor, merge, product, rule_at


@triton.jit
def store_left(P, d, u, c, K: tl.constexpr, I: tl.constexpr, R: tl.constexpr):
    """d [., .] at (u, c), broadcast, as left (n, K, r)."""
    tl.store(P + (c // R) * (K * R) + u * R + c % R, d, mask=(u < K) & (c < I))


@triton.jit
def store_right(P, d, u, c, K: tl.constexpr, I: tl.constexpr):
    """d at (u, c), broadcast, as right (n, r, K)."""
    tl.store(P + c * K + u, d, mask=(u < K) & (c < I))


@triton.jit
def sum_dz(d, NI: tl.constexpr):
    """[BK, m NI] = x^T dz_operand, summed to [BK, NI]; of four columns two are the same as the others."""
    if d.shape[1] == 4 * NI:
        d = tl.where(tl.arange(0, d.shape[1])[None, :] % 2 == 0, d, 0.0)
    return merge(d, NI)


@triton.jit
def store_out_side(
    P_T2, P_B2, d, u, scale,
    K: tl.constexpr, N: tl.constexpr, I: tl.constexpr, NI: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """[BK, m NI] = g^T v_operand, scaled: even columns add up to dt2, the first odd one is db2."""
    M: tl.constexpr = d.shape[1] // NI
    o = tl.arange(0, d.shape[1])[None, :]
    c = tl.arange(0, NI)[None, :]
    inside = (u < K)[:, None]
    d_t2 = merge(tl.where(o % 2 == 0, d, 0.0), NI)
    tl.store(P_T2 + c * K + u[:, None], d_t2 * scale, mask=inside & (c < I))
    if HAS_BIAS:
        d_b2 = merge(tl.where(o % M == 1, d, 0.0), NI)
        tl.store(P_B2 + c * K + u[:, None], d_b2 * scale, mask=inside & (c < N))


@triton.jit
def store_rule(P, d, c, outer, inner, N: tl.constexpr, R: tl.constexpr, LEFT: tl.constexpr):
    """d at (c, outer, inner), broadcast, as r rules (n, n, n); LEFT swaps outer and inner."""
    if LEFT:
        o_rule = inner * N + outer
    else:
        o_rule = outer * N + inner
    o_rule += (c % R) * (N * N * N) + (c // R) * (N * N)
    tl.store(P + o_rule, d, mask=(c < N * R) & (outer < N) & (inner < N))


@triton.jit
def store_folded(
    P_RULE, P_FACTOR, d, A, W, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NI: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, DP: tl.constexpr, LEFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC [NP * NI, DP] as the gradients of the rule and of the factor that `folded` multiplied.

    down: dA_i[p, q] = sum_v dC[(p, i), (q, v)] t_i[v],    dt_i[v] = sum_{p, q} dC[(p, i), (q, v)] A_i[p, q];
    up (LEFT) has (q, i), (p, v) and s instead.
    """
    if NP * E == DP:
        outer = tl.arange(0, NP)[:, None, None]
        c = tl.arange(0, NI)
        inner = tl.arange(0, NP)[None, None, :]
        v = tl.arange(0, E)
        d = tl.reshape(d, (NP, NI, NP, E))
        w = factor(W, v[None, :], c[:, None], D, N * R, R, LEFT)
        a = rule_at(A, c[None, :, None], outer, inner, N, R, LEFT)
        d_rule = tl.sum(d * w[None, :, None, :], 3)
        d_factor = tl.sum(tl.sum(d * a[:, :, :, None], 2), 0)
        store_rule(P_RULE, d_rule, c[None, :, None], outer, inner, N, R, LEFT)
    else:
        # sums over a part of e, which is no axis here, are products with one-hot matrices
        NQ: tl.constexpr = NP if NP > 16 else 16
        j = tl.arange(0, NP * NI)[:, None]
        e = tl.arange(0, DP)
        inner = tl.arange(0, NQ)[None, :]
        v = tl.arange(0, DP)
        w = factor(W, (e % E)[None, :], j % NI, D, N * R, R, LEFT)
        a = rule_at(A, j % NI, j // NI, (e // E)[None, :], N, R, LEFT)
        d_rule = product(d * w, ((e // E)[:, None] == inner).to(tl.float32), PRECISION)
        d_factor = product(d * a, ((e % E)[:, None] == v[None, :]).to(tl.float32), PRECISION)
        d_factor = tl.sum(tl.reshape(d_factor, (NP, NI, DP)), 0)
        store_rule(P_RULE, d_rule, j % NI, j // NI, inner, N, R, LEFT)
        c = tl.arange(0, NI)
    if LEFT:
        store_left(P_FACTOR, d_factor, v[None, :], c[:, None], D, N * R, R)
    else:
        store_right(P_FACTOR, d_factor, v[None, :], c[:, None], D, N * R)


@triton.jit
def store_sums(
    PART, sums, A1, T1, A2, S2,
    O_A1: tl.constexpr, O_T1: tl.constexpr, O_B1: tl.constexpr, O_A2: tl.constexpr, O_S2: tl.constexpr,
    N1: tl.constexpr, R1: tl.constexpr, NI1: tl.constexpr, NP1: tl.constexpr, D1: tl.constexpr, E1: tl.constexpr,
    N2: tl.constexpr, R2: tl.constexpr, NI2: tl.constexpr, NP2: tl.constexpr, D2: tl.constexpr, E2: tl.constexpr,
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
            store_rule(PART + O_A1, sums[0], c, p[None, :, None], p[None, None, :], N1, R1, False)
    elif FOLD:
        store_folded(PART + O_A1, PART + O_T1, sums[0], A1, T1, N1, NP1, R1, NI1, D1, E1, DP, False, PRECISION)
        store_folded(PART + O_A2, PART + O_S2, sums[1], A2, S2, N2, NP2, R2, NI2, D2, E2, DP, True, PRECISION)
        e = tl.arange(0, DP)
        inside = (e // E1 < N1) & (e % E1 < D1)
        tl.store(PART + O_B1 + e // E1 * D1 + e % E1, tl.sum(sums[2], 0), mask=inside)
    else:
        p = tl.arange(0, NP1)
        v = tl.arange(0, DP)
        c1 = tl.arange(0, NI1)
        c2 = tl.arange(0, NI2)
        store_rule(PART + O_A1, sums[0], c1[:, None, None], p[None, :, None], p[None, None, :], N1, R1, False)
        store_rule(PART + O_A2, sums[1], c2[:, None, None], p[None, :, None], p[None, None, :], N2, R2, False)
        store_right(PART + O_T1, sums[2], v[None, :], c1[:, None], D1, N1 * R1)
        store_left(PART + O_S2, sums[3], v[None, :], c2[:, None], D2, N2 * R2, R2)
        o_bias = p[:, None] * D1 + v[None, :]
        tl.store(PART + O_B1 + o_bias, sums[4], mask=(p < N1)[:, None] & (v < D1)[None, :])
