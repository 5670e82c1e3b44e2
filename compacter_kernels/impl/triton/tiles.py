"""What the kernels are made of: operands from the factors, the products with them, the mixes by the rule.

A tile is BT tokens. Its rows r = (token, p) are those of x seen as [T*n, in/n], n padded to NP = 2^m, so BT * NP rows.
Its columns c = (i, rho) run over slices and rank, padded to NI = 2^m. What is padded is zero.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# the interpreter multiplies bfloat16 matrices wrongly (seen on 3.6 and 3.9), so there all products are float32
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def operands(a, b, PRECISION: tl.constexpr):
    """Both as the products take them: PRECISION is that of float32 operands, "bf16" rounds them."""
    if PRECISION == "bf16":
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return a, b


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in float32."""
    a, b = operands(a, b, PRECISION)
    if PRECISION == "bf16" or INTERPRETED:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b, summed in float32."""
    a, b = operands(a, b, PRECISION)
    if PRECISION == "bf16" or INTERPRETED:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def output(a, b, P: tl.constexpr):
    """a b of the wide side, as it is stored.

    TURN: as the transpose of b^T a^T. A product itself AMD's compiler stores in pieces of four numbers, as they come
    out of the matrix units, which for 16-bit numbers is half of what one access can take.
    """
    if P.PRECISION.TURN:
        return tl.trans(product(tl.trans(b), tl.trans(a), P.PRECISION.WIDE))
    else:
        return product(a, b, P.PRECISION.WIDE)


@triton.jit
def dot_apart(a, b, acc, turns, PRECISION: tl.constexpr):
    """The same in a loop of so many turns, which is 1; the compiler must not know (`middle.once`).

    A product in a loop of its own is spread over the warps by its own shape. Otherwise it is spread like those around
    it, whose rows may be so few that every warp would compute the same.
    """
    for _ in tl.range(0, turns):
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def interleave(a, b):
    """[M, C] and [M, C] -> [M, 2 C]: each column of a followed by that of b."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def rounded(a, LP: tl.constexpr):
    """a as the sum of two numbers that LP holds (the second nearly so), still float32.

    The conversion to LP comes last, after every reshape: a reshape right before a product makes Triton 3.6 fail on
    8 warps (`Illegal shared layout`).
    """
    high = a.to(LP).to(tl.float32)
    return high, a - high


@triton.jit
def split(a, LP: tl.constexpr, SPLIT: tl.constexpr):
    """[M, C] float32 as an operand of dtype LP; SPLIT: [M, 2 C], each column as the two numbers of `rounded`."""
    if SPLIT:
        high, low = rounded(a, LP)
        return interleave(high, low).to(LP)
    else:
        return a.to(LP)


@triton.jit
def wide_split(a, LP: tl.constexpr, SPLIT: tl.constexpr):
    """`split`, of four columns where C is 4 (the last is 0): 16 columns are the least that warp-group products take."""
    if SPLIT and a.shape[1] == 4:
        high, low = rounded(a, LP)
        middle, low = rounded(low, LP)
        return interleave(interleave(high, low), interleave(middle, tl.zeros(a.shape, tl.float32))).to(LP)
    else:
        return split(a, LP, SPLIT)


@triton.jit
def merge(a, C: tl.constexpr):
    """[M, m C], m columns for each of C, summed to [M, C]."""
    M: tl.constexpr = a.shape[1] // C
    if M > 1:
        return tl.sum(tl.reshape(a, (a.shape[0], C, M)), 2)
    else:
        return a


@triton.jit
def factor(W, u, c, K: tl.constexpr, side: tl.constexpr, LEFT: tl.constexpr):
    """s_i[u] of left (n, K, r) or t_i[u] of right (n, r, K), i = c // r: float32, 0 outside; u and c broadcast."""
    if LEFT:
        p_w = W + (c // side.R) * (K * side.R) + u * side.R + c % side.R
    else:
        p_w = W + c * K + u
    return tl.load(p_w, mask=(u < K) & (c < side.C), other=0.0).to(tl.float32)


@triton.jit
def folded(A, W, b, side: tl.constexpr, P: tl.constexpr, LEFT: tl.constexpr):
    """Block b of the rule folded into the factor on the bottleneck's side, [NP * NI, EB] float32.

    down (right, t): [(p, c), (q, v)] = A_i[p, q] t_c[v];  up (left, s): [(q, c), (p, v)] = A_i[p, q] s_c[v].
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
    """A_i[outer, inner], or LEFT A_i[inner, outer], i = c // R: float32, 0 outside; the indices broadcast."""
    if LEFT:
        o_rule = (c // side.R) * (side.N * side.N) + inner * side.N + outer
    else:
        o_rule = (c // side.R) * (side.N * side.N) + outer * side.N + inner
    return tl.load(A + o_rule, mask=(c < side.C) & (outer < side.N) & (inner < side.N), other=0.0).to(tl.float32)


@triton.jit
def unfolded(A, side: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The rule for each column c = (i, rho): [NI, NP, NP] float32, A_i[p, q] at (c, p, q); TRANSPOSED: (c, q, p)."""
    c = tl.arange(0, side.NI)[:, None, None]
    p = tl.arange(0, side.NP)[None, :, None]
    q = tl.arange(0, side.NP)[None, None, :]
    return rule_at(A, c, p, q, side, TRANSPOSED)


@triton.jit
def by_column(z, side: tl.constexpr, P: tl.constexpr):
    """[BT * NP, NI] as [NI, BT, NP]."""
    return tl.permute(tl.reshape(z, (P.BT, side.NP, side.NI)), (2, 0, 1))


@triton.jit
def mix(z, a, side: tl.constexpr, P: tl.constexpr):
    """V[(t, q), c] = sum_p Z[(t, p), c] a[c, p, q]: [BT * NP, NI] -> the same shape."""
    v = product(by_column(z, side, P), a, P.PRECISION.MIDDLE)
    return tl.reshape(tl.permute(v, (1, 2, 0)), (P.BT * side.NP, side.NI))


@triton.jit
def dz_operand(dz, LP: tl.constexpr, SPLIT: tl.constexpr):
    """[rows, NI] as [rows, m NI]: as it is, or each column as the two numbers of `rounded`; twice where NI is 4."""
    if SPLIT and dz.shape[1] == 4:
        high, low = rounded(dz, LP)
        return interleave(interleave(high, low), interleave(high, low)).to(LP)
    else:
        return split(dz, LP, SPLIT)


@triton.jit
def s_operand(s, LP: tl.constexpr, SPLIT: tl.constexpr):
    """[BK, NI] -> [m NI, BK], the partner of `dz_operand` in dx = dZ s, with what rounding took where NI is 4."""
    high, low = rounded(s, LP)
    if SPLIT and s.shape[1] == 4:
        return tl.trans(interleave(interleave(high, high), interleave(low, low)).to(LP))
    elif SPLIT:
        return tl.trans(interleave(high, high).to(LP))
    else:
        return tl.trans(high.to(LP))


@triton.jit
def v_operand(v, p, N: tl.constexpr, LP: tl.constexpr):
    """[rows, m NI]: each column of V followed by 1 where the row's p is c, which picks row c of the bias.

    m = 2, or 4 where NI is 4: V rounded, 1, what rounding took, 1.
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
    """[m NI, BK], the partner of `v_operand` in out = V t + b: rows scale t_c[u], and row c of scale b."""
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
