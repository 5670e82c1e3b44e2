"""The middle of a token, from the n^2 r numbers of Z to those of V2.

With FOLD (n <= 8) the rule is folded into the factor next to it: [BT, n^2 r] meets two small
matrices, for one block of EB columns of the bottleneck at a time. Otherwise the mixes by the rule
are separate, with n^3 r operations each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.functions import activate
from compacter_kernels.impl.triton.tiles import dot, dot_apart, factor, folded, mix, product, unfolded


@triton.jit
def again(tile, T):
    """0, unknown to the compiler, which must repeat a load at this offset in each tile."""
    return tile * (tl.minimum(T, 0) * 16)


@triton.jit
def once(T):
    """1, unknown to the compiler."""
    return 1 + tl.minimum(T, 0)


@triton.jit
def blocks(T, P: tl.constexpr):
    """The number of bottleneck blocks, unknown to the compiler, which must keep the loop."""
    return P.DP // P.EB - 1 + once(T)


@triton.jit
def folded_rule(A, side: tl.constexpr):
    """A_i[p, q] at ((p, c), (q, c)), 0 elsewhere: [NP * NI, MP * NI] float32."""
    j = tl.arange(0, side.NP * side.NI)
    k = tl.arange(0, side.MP * side.NI)
    p = (j // side.NI)[:, None]
    q = (k // side.NI)[None, :]
    c = (j % side.NI)[:, None]
    m = (p < side.N) & (q < side.M) & (c < side.C) & ((k % side.NI)[None, :] == c)
    return tl.load(A + (c // side.R) * (side.N * side.M) + p * side.M + q, mask=m, other=0.0).to(tl.float32)


@triton.jit
def inside(e, side: tl.constexpr):
    """Whether a column of the bottleneck is not padding."""
    return (e // side.E < side.N) & (e % side.E < side.D)


@triton.jit
def folded_weights(b, A1, T1, B1, A2, S2, P: tl.constexpr):
    """Block b of C1, C2 (middle_backward.py) and b1."""
    c1 = folded(A1, T1, b, P.IN, P, False)
    c2 = folded(A2, S2, b, P.OUT, P, True)
    e = b * P.EB + tl.arange(0, P.EB)
    if B1 is not None:
        o_bias = e // P.IN.E * P.IN.D + e % P.IN.E
        b1 = tl.load(B1 + o_bias, mask=inside(e, P.IN), other=0.0).to(tl.float32)
    else:
        b1 = tl.zeros((P.EB,), tl.float32)
    return c1, c2, b1


@triton.jit
def right_factor(T1, P: tl.constexpr):
    """t1 [NI, DP]."""
    return factor(T1, tl.arange(0, P.DP)[None, :], tl.arange(0, P.IN.NI)[:, None], P.IN.D, P.IN, False)


@triton.jit
def left_factor(S2, P: tl.constexpr):
    """s2 [NI, DP]."""
    return factor(S2, tl.arange(0, P.DP)[None, :], tl.arange(0, P.OUT.NI)[:, None], P.OUT.D, P.OUT, True)


@triton.jit
def held_weights(A1, T1, B1, A2, S2, P: tl.constexpr):
    """The weights of `held_middle`: C1, C2 and b1 of each block, or the rule of one projection."""
    if P.ACTIVATION is None:
        return (folded_rule(A1, P.IN),)
    else:
        held = ()
        for b in tl.static_range(P.DP // P.EB):
            held = held + folded_weights(b, A1, T1, B1, A2, S2, P)
        return held


@triton.jit
def into_bottleneck(z, A1, T1, B1, P: tl.constexpr):
    """V1 and y = V1 t1 + b1, [BT * NP, DP], without folding."""
    v1 = mix(z, unfolded(A1, P.IN, False), P.IN, P)
    y = product(v1, right_factor(T1, P), P.PRECISION.MIDDLE)
    if B1 is not None:
        p = tl.arange(0, P.IN.NP)
        v = tl.arange(0, P.DP)
        m = (p < P.IN.N)[:, None] & (v < P.IN.D)[None, :]
        b1 = tl.load(B1 + p[:, None] * P.IN.D + v[None, :], mask=m, other=0.0).to(tl.float32)
        y = tl.reshape(tl.reshape(y, (P.BT, P.IN.NP, P.DP)) + b1[None, :, :], (P.BT * P.IN.NP, P.DP))
    return v1, y


@triton.jit
def unpadded(P: tl.constexpr):
    """The mask of the unfolded bottleneck [BT * NP, DP] without its padding."""
    p = tl.arange(0, P.BT * P.IN.NP) % P.IN.NP
    return (p < P.IN.N)[:, None] & (tl.arange(0, P.DP) < P.IN.D)[None, :]


@triton.jit
def through_block(b, zj, v2, weights, P: tl.constexpr):
    """v2 + the contribution of block b of the bottleneck."""
    c1, c2, b1 = weights
    y = product(zj, c1, P.PRECISION.MIDDLE) + b1[None, :]
    m = inside(b * P.EB + tl.arange(0, P.EB), P.IN)
    h = tl.where(m[None, :], activate(y, P.ACTIVATION), 0.0)
    return dot(h, tl.trans(c2), v2, P.PRECISION.MIDDLE)


@triton.jit
def held_middle(z, held, P: tl.constexpr):
    """`middle` for a folded rule, with weights that stay in registers for all tiles."""
    zj = tl.reshape(z, (P.BT, P.IN.NP * P.IN.NI))
    if P.ACTIVATION is None:
        v2 = product(zj, held[0], P.PRECISION.MIDDLE)
    else:
        v2 = tl.zeros((P.BT, P.OUT.NP * P.OUT.NI), tl.float32)
        for b in tl.static_range(P.DP // P.EB):
            v2 = through_block(b, zj, v2, (held[3 * b], held[3 * b + 1], held[3 * b + 2]), P)
    return tl.reshape(v2, (P.BT * P.OUT.NP, P.OUT.NI))


@triton.jit
def dense_bottleneck(z, B1, P: tl.constexpr):
    """y = z + b1 and act(y) of a dense bottleneck."""
    c = tl.arange(0, P.IN.NI)
    y = z
    if B1 is not None:
        y = z + tl.load(B1 + c, mask=c < P.IN.C, other=0.0).to(tl.float32)[None, :]
    return y, tl.where((c < P.IN.C)[None, :], activate(y, P.ACTIVATION), 0.0)


@triton.jit
def middle(z, tile, T, A1, T1, B1, A2, S2, P: tl.constexpr):
    """Z [BT * NP, NI] of x's side -> V2 [BT * NP, NI] of the output's, float32."""
    PRECISION: tl.constexpr = P.PRECISION.MIDDLE
    zero = again(tile, T)
    if P.DENSE:
        _, v2 = dense_bottleneck(z, B1, P)
    elif P.FOLD:
        zj = tl.reshape(z, (P.BT, P.IN.NP * P.IN.NI))
        v2 = tl.zeros((P.BT, P.OUT.NP * P.OUT.NI), tl.float32)
        if P.ACTIVATION is None:
            v2 = dot_apart(zj, folded_rule(A1 + zero, P.IN), v2, once(T), PRECISION)
        else:
            for b in tl.range(0, blocks(T, P)):
                v2 = through_block(b, zj, v2, folded_weights(b, A1, T1, B1, A2, S2, P), P)
        v2 = tl.reshape(v2, (P.BT * P.OUT.NP, P.OUT.NI))
    elif P.ACTIVATION is None:
        v2 = mix(z, unfolded(A1 + zero, P.IN, False), P.IN, P)
    else:
        _, y = into_bottleneck(z, A1 + zero, T1 + zero, B1, P)
        h = tl.where(unpadded(P), activate(y, P.ACTIVATION), 0.0)
        z2 = product(h, tl.trans(left_factor(S2 + zero, P)), PRECISION)
        v2 = mix(z2, unfolded(A2 + zero, P.OUT, False), P.OUT, P)
    return v2
