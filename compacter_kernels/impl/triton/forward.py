"""The forward kernel, which reads x once, holds n^2 r numbers of a token, and writes out once.

Z[p, i] = sum_u x[p, u] s1_i[u]
adapter:  V[q, i] = sum_p A1_i[p, q] Z[p, i],  y[q, v] = sum_i V[q, i] t1_i[v] + b1,  h = act(y),
          Z2[p, i] = sum_v h[p, v] s2_i[v],    V2[q, i] = sum_p A2_i[p, q] Z2[p, i]
linear:   V2[q, i] = sum_p A1_i[p, q] Z[p, i]
out[q, u] = residual[q, u] + scale (sum_i V2[q, i] t2_i[u] + b2[q, u])
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.columns import block, contract, count, load_blocks, rows, stream
from compacter_kernels.impl.triton.middle import held_middle, held_weights, middle
from compacter_kernels.impl.triton.tiles import dense_operand, factor, output, product, t_operand, v_operand, wide_split


@triton.jit
def forward_tiles(walk, X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, scale, T, P: tl.constexpr):
    """The tiles of a walk (first, end, step), whose x stays on chip."""
    c1 = tl.arange(0, P.IN.NI)
    s1 = ()
    for b in tl.static_range((P.IN.K + P.BK - 1) // P.BK):
        s = factor(S1, block(b, P.BK)[:, None], c1[None, :], P.IN.K, P.IN, True)
        s1 = s1 + (wide_split(s, P.PRECISION.LP, P.PRECISION.SPLIT),)
    t2 = ()
    for b in tl.static_range((P.OUT.K + P.BK - 1) // P.BK):
        t2 = t2 + (t_operand(T2, B2, scale, block(b, P.BK), P.OUT, P.PRECISION.LP),)
    held = held_weights(A1, T1, B1, A2, S2, P)
    for tile in tl.range(walk[0], walk[1], walk[2], num_stages=P.STAGES):
        xs = load_blocks(tile, X, T, P.IN, P)
        v2 = held_middle(contract(xs, s1, P.IN, P), held, P)
        p, first, o_out, m_out = rows(tile, T, P.OUT.K, P.OUT, P)
        v = v_operand(v2, p, P.OUT.N, P.PRECISION.LP)
        for b in tl.static_range((P.OUT.K + P.BK - 1) // P.BK):
            u = block(b, P.BK)
            m = m_out[:, None] & (u < P.OUT.K)[None, :]
            o = product(v, t2[b], P.PRECISION.WIDE)
            if P.OPTIONS.SAME:
                o += xs[b].to(tl.float32)
            elif RESIDUAL is not None:
                o += tl.load(RESIDUAL + first + (o_out[:, None] + u[None, :]), mask=m, other=0.0).to(tl.float32)
            tl.store(OUT + first + (o_out[:, None] + u[None, :]), o.to(OUT.dtype.element_ty), mask=m)


@triton.jit
def streamed_tiles(walk, X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, scale, T, P: tl.constexpr):
    """The tiles of a walk with long rows, in two loops over blocks. A cache serves the second."""
    for tile in tl.range(walk[0], walk[1], walk[2]):
        z = stream(tile, X, T, S1, 1.0, P.IN, P, True)
        v2 = middle(z, tile, count(T, P), A1, T1, B1, A2, S2, P)
        p, first, o_out, m_out = rows(tile, T, P.OUT.K, P.OUT, P)
        if P.DENSE:
            v = v2.to(P.PRECISION.LP)
        else:
            v = v_operand(v2, p, P.OUT.N, P.PRECISION.LP)
        for b in tl.range(0, (P.OUT.K + P.BK - 1) // P.BK, num_stages=P.STAGES):
            u = block(b, P.BK)
            m = m_out[:, None] & (u < P.OUT.K)[None, :]
            if P.DENSE:
                o = output(v, dense_operand(T2, scale, u, P.OUT, P.PRECISION.LP), P)
                if B2 is not None:
                    o += (tl.load(B2 + u, mask=u < P.OUT.K, other=0.0).to(tl.float32) * scale)[None, :]
            else:
                o = output(v, t_operand(T2, B2, scale, u, P.OUT, P.PRECISION.LP), P)
            if RESIDUAL is not None:
                o += tl.load(RESIDUAL + first + (o_out[:, None] + u[None, :]), mask=m, other=0.0).to(tl.float32)
            tl.store(OUT + first + (o_out[:, None] + u[None, :]), o.to(OUT.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T"])
def forward(X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, scale, T, P: tl.constexpr):
    """Each program loops over tiles of BT tokens."""
    walk = (tl.program_id(0), tl.cdiv(T, P.BT), tl.num_programs(0))
    forward_tiles(walk, X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, scale, T, P)


@triton.jit(do_not_specialize=["T"])
def forward_streamed(X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, scale, T, P: tl.constexpr):
    """Each program loops over tiles of BT tokens, whose x is read twice."""
    walk = (tl.program_id(0), tl.cdiv(T, P.BT), tl.num_programs(0))
    streamed_tiles(walk, X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, scale, T, P)
