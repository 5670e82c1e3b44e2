"""The parts of the kernels: operands from the factors, products with them, mixes by the rule.

A tile is BT tokens. Its BT * NP rows r = (token, p) are those of x as [T*n, in/n], with n padded to
NP = 2^m. Its columns c = (i, rho) are the slices and the rank, padded to NI = 2^m. Padding is zero.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter of 3.6 and 3.9 multiplies bfloat16 matrices wrongly, so it gets float32 products.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def truncated(a):
    """A float32 operand as a tensor core reads it for tf32: without its last 13 bits."""
    return (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in float32. PRECISION is that of float32 operands; "bf16" rounds them."""
    tl.static_assert(a.shape[-1] >= 16, "Triton 3.6 refuses shorter rows")
    if PRECISION == "bf16":
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if PRECISION == "tf32":
            a = truncated(a)
            b = truncated(b)
    if PRECISION == "bf16" or INTERPRETED:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b, summed in float32."""
    return dot(a, b, None, PRECISION)


@triton.jit
def add_turned(total, a, b, P: tl.constexpr):
    """total + a b of the wide side, or a b if total is None; with TURN transposed, as b^T a^T.

    AMD's compiler stores a product in pieces of four numbers, as its matrix units produce them; of
    16-bit numbers one access could store eight.
    """
    if P.PRECISION.TURN:
        return dot(tl.trans(b), tl.trans(a), total, P.PRECISION.WIDE)
    else:
        return dot(a, b, total, P.PRECISION.WIDE)


@triton.jit
def turned(total, P: tl.constexpr):
    """A sum of `add_turned` as [rows, BK], in the layout for the store; and the reverse."""
    if P.PRECISION.TURN:
        return tl.trans(total)
    else:
        return total


@triton.jit
def output(a, b, P: tl.constexpr):
    """a b of the wide side, in the layout for the store."""
    return turned(add_turned(None, a, b, P), P)


@triton.jit
def dot_apart(a, b, acc, turns, PRECISION: tl.constexpr):
    """`dot` in a loop of turns = 1, which the compiler must not know (`middle.once`).

    The compiler distributes a product in its own loop over the warps by its own shape. Otherwise it
    follows the products nearby, which may have so few rows that every warp computes the same.
    """
    for _ in tl.range(0, turns):
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def add_product(total, a, b, turns, PRECISION: tl.constexpr):
    """total + a b, for a total over all tiles. turns: see `dot_apart`.

    A tensor core truncates a sum when it adds to its accumulator. So each tile has its own, and a
    float32 addition rounds. It is written as fma, since the compiler makes `dot` of total + a b. It
    adds products of several parts (tf32x3, bf16x6) in this way by itself. "bf16" stands where
    registers are short (plan.py); there the rounding of the operands weighs more.
    """
    if PRECISION == "tf32":
        nothing = tl.zeros(total.shape, tl.float32)
        return tl.fma(dot_apart(a, b, nothing, turns, PRECISION), 1.0, total)
    else:
        return dot_apart(a, b, total, turns, PRECISION)


@triton.jit
def interleave(a, b):
    """Join [M, C] and [M, C] to [M, 2 C]: each column of a, followed by that of b."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def rounded(a, LP: tl.constexpr):
    """a as the sum of two float32 numbers; LP holds the first exactly, the second nearly.

    The conversion to LP must follow every reshape, since a reshape right before a product makes
    Triton 3.6 fail on 8 warps (`Illegal shared layout`).
    """
    high = a.to(LP).to(tl.float32)
    return high, a - high


@triton.jit
def split(a, LP: tl.constexpr, SPLIT: tl.constexpr):
    """[M, C] float32 as an operand in LP; with SPLIT [M, 2 C], the two numbers of `rounded`."""
    if SPLIT:
        high, low = rounded(a, LP)
        return interleave(high, low).to(LP)
    else:
        return a.to(LP)


@triton.jit
def wide_split(a, LP: tl.constexpr, SPLIT: tl.constexpr):
    """`split`, but for C = 4 into four columns, the last 0: warp-group products need 16."""
    if SPLIT and a.shape[1] == 4:
        high, low = rounded(a, LP)
        middle, low = rounded(low, LP)
        return interleave(interleave(high, low), interleave(middle, tl.zeros(a.shape, tl.float32))).to(LP)
    else:
        return split(a, LP, SPLIT)


@triton.jit
def merge(a, C: tl.constexpr):
    """Sum [M, m C], m neighbouring columns for each of C, to [M, C]."""
    M: tl.constexpr = a.shape[1] // C
    if M > 1:
        return tl.sum(tl.reshape(a, (a.shape[0], C, M)), 2)
    else:
        return a


@triton.jit
def factor_pointers(W, u, c, K: tl.constexpr, side: tl.constexpr, LEFT: tl.constexpr):
    """Pointers to s_c[u] of left (n, K, r) or t_c[u] of right (n, r, K); u and c broadcast."""
    if side.DENSE:
        if LEFT != side.TURNED:
            return W + u * side.R + c
        else:
            return W + c * K + u
    elif LEFT:
        return W + (c // side.R) * (K * side.R) + u * side.R + c % side.R
    else:
        return W + c * K + u


@triton.jit
def factor(W, u, c, K: tl.constexpr, side: tl.constexpr, LEFT: tl.constexpr):
    """s_c[u] or t_c[u], float32, 0 outside."""
    p_w = factor_pointers(W, u, c, K, side, LEFT)
    return tl.load(p_w, mask=(u < K) & (c < side.C), other=0.0).to(tl.float32)


@triton.jit
def folded(A, W, b, side: tl.constexpr, P: tl.constexpr, LEFT: tl.constexpr):
    """Block b of the rule folded into the factor on the bottleneck's side, [NP * NI, EB] float32.

    down: [(p, c), (q, v)] = A_i[p, q] t_c[v];  up (LEFT): [(q, c), (p, v)] = A_i[p, q] s_c[v].
    A column e of the bottleneck is (e // E, e % E); E is D, or D padded so that DP = NP * E.
    """
    if side.NP * side.E == P.DP:
        outer = tl.arange(0, side.NP)[:, None, None]
        c = tl.arange(0, side.NI)
        inner = b * (P.EB // side.E) + tl.arange(0, P.EB // side.E)[None, None, :]
        a = rule_at(A, c[None, :, None], outer, inner, side, LEFT)
        w = factor(W, tl.arange(0, side.E)[None, :], c[:, None], side.D, side, LEFT)
        return tl.reshape(a[:, :, :, None] * w[None, :, None, :], (side.NP * side.NI, P.EB))
    else:
        j = tl.arange(0, side.NP * side.NI)[:, None]
        e = tl.arange(0, P.DP)[None, :]
        a = rule_at(A, j % side.NI, j // side.NI, e // side.E, side, LEFT)
        return a * factor(W, e % side.E, j % side.NI, side.D, side, LEFT)


@triton.jit
def rule_at(A, c, outer, inner, side: tl.constexpr, LEFT: tl.constexpr):
    """A_i[outer, inner], or with LEFT A_i[inner, outer], i = c // R: float32, 0 outside."""
    if LEFT:
        o_rule = (c // side.R) * (side.N * side.N) + inner * side.N + outer
    else:
        o_rule = (c // side.R) * (side.N * side.M) + outer * side.M + inner
    return tl.load(A + o_rule, mask=(c < side.C) & (outer < side.N) & (inner < side.M), other=0.0).to(tl.float32)


@triton.jit
def unfolded(A, side: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The rule by columns, [NI, NP, MP] float32: A_i[p, q] at (c, p, q) or TRANSPOSED (c, q, p)."""
    c = tl.arange(0, side.NI)[:, None, None]
    p = tl.arange(0, side.NP)[None, :, None]
    q = tl.arange(0, side.MP)[None, None, :]
    return rule_at(A, c, p, q, side, TRANSPOSED)


@triton.jit
def by_column(z, side: tl.constexpr, P: tl.constexpr):
    """[BT * NP, NI] as [NI, BT, NP]."""
    return tl.permute(tl.reshape(z, (P.BT, side.NP, side.NI)), (2, 0, 1))


@triton.jit
def mix(z, a, side: tl.constexpr, P: tl.constexpr):
    """V[(t, q), c] = sum_p Z[(t, p), c] a[c, p, q]: [BT * NP, NI] -> [BT * MP, NI]."""
    v = product(by_column(z, side, P), a, P.PRECISION.MIDDLE)
    return tl.reshape(tl.permute(v, (1, 2, 0)), (P.BT * side.MP, side.NI))


@triton.jit
def dz_operand(dz, LP: tl.constexpr, SPLIT: tl.constexpr):
    """[rows, NI] or with SPLIT [rows, m NI], the two numbers of `rounded`, twice if NI is 4."""
    if SPLIT and dz.shape[1] == 4:
        high, low = rounded(dz, LP)
        return interleave(interleave(high, low), interleave(high, low)).to(LP)
    else:
        return split(dz, LP, SPLIT)


@triton.jit
def s_operand(s, LP: tl.constexpr, SPLIT: tl.constexpr):
    """[BK, NI] -> [m NI, BK], the other operand of dx = dZ s; rounding errors too if NI is 4."""
    high, low = rounded(s, LP)
    if SPLIT and s.shape[1] == 4:
        return tl.trans(interleave(interleave(high, high), interleave(low, low)).to(LP))
    elif SPLIT:
        return tl.trans(interleave(high, high).to(LP))
    else:
        return tl.trans(high.to(LP))


@triton.jit
def v_operand(v, p, N: tl.constexpr, LP: tl.constexpr):
    """[rows, m NI]: each column of V and a 1 where the row's p is c, which picks row c of the bias.

    m = 2, or 4 if NI is 4: V rounded, 1, the rounding error, 1.
    """
    c = tl.arange(0, v.shape[1])
    onehot = ((p[:, None] == c[None, :]) & (c < N)[None, :]).to(tl.float32)
    high, low = rounded(v, LP)
    if v.shape[1] == 4:
        return interleave(interleave(high, low), interleave(onehot, onehot)).to(LP)
    else:
        return interleave(high, onehot).to(LP)


@triton.jit
def t_operand(T, B, scale, u, side: tl.constexpr, LP: tl.constexpr):
    """[m NI, BK], the other operand of out = V t + b: rows scale t_c[u] and row c of scale b."""
    c = tl.arange(0, side.NI)[None, :]
    t = factor(T, u[:, None], c, side.K, side, False) * scale
    if B is not None:
        m = (c < side.N) & (u < side.K)[:, None]
        b = tl.load(B + c * side.K + u[:, None], mask=m, other=0.0).to(tl.float32) * scale
    else:
        b = tl.zeros(t.shape, tl.float32)
    if side.NI == 4:
        b_high, b_low = rounded(b, LP)
        return tl.trans(interleave(interleave(t, t), interleave(b_high, b_low)).to(LP))
    else:
        return tl.trans(interleave(t, b).to(LP))


@triton.jit
def dense_operand(W, scale, u, side: tl.constexpr, LP: tl.constexpr):
    """[NI, BK] of a dense projection, scale W[c, u]."""
    return tl.trans((factor(W, u[:, None], tl.arange(0, side.NI)[None, :], side.K, side, False) * scale).to(LP))


@triton.jit
def mixed_operand(v, p, w, N: tl.constexpr, LP: tl.constexpr):
    """`v_operand` for a bias that enters with the weight w of its row."""
    c = tl.arange(0, v.shape[1])
    chosen = tl.where((p[:, None] == c[None, :]) & (c < N)[None, :], w[:, None], 0.0)
    high, low = rounded(v, LP)
    if v.shape[1] == 4:
        return interleave(interleave(high, low), interleave(chosen, chosen)).to(LP)
    else:
        return interleave(high, chosen).to(LP)
