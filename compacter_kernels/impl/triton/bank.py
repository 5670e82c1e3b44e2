"""The kernels of a routed bank, in which each row of x belongs to one of E adapters, or to none.

The rows are taken in the order of their adapters. A tile holds rows of one adapter, and a program
has tiles of one adapter: it is a program of the single kernel, on the weights of its adapter and
the rows of that. TABLE [2, E + 1] int32 has the first position of each adapter in that order, and
its first program (routes.py). So the programs of an adapter are neighbours, as are their rows of
partial sums. Programs beyond the last adapter's have nothing to do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.impl.triton.backward import backward_tiles
from compacter_kernels.impl.triton.columns import block
from compacter_kernels.impl.triton.forward import forward_tiles, streamed_tiles
from compacter_kernels.impl.triton.two_phase import column_tiles, sum_tiles, token_tiles


@triton.jit
def share(program, n, ORDER, per, TABLE, P: tl.constexpr):
    """The adapter of a program, its walk through tiles of the adapter, and the adapter's tokens.

    n: the parts of a row that BT counts. The tokens are for columns.gathered. Adapter E: none.
    """
    E: tl.constexpr = P.ADAPTERS
    PROGRAMS = TABLE + (E + 1)
    i = tl.arange(0, P.PADDED)
    ends = tl.load(PROGRAMS + 1 + i, mask=i < E, other=0)
    e = tl.sum(((ends <= program) & (i < E)).to(tl.int32), 0)
    known = tl.minimum(e, E - 1)
    first, end = tl.load(PROGRAMS + known), tl.load(PROGRAMS + 1 + known)
    position = tl.load(TABLE + known)
    number = tl.load(TABLE + 1 + known) - position
    walk = (program - first, tl.cdiv(number.to(tl.int64) * n, P.BT).to(tl.int32), end - first)
    return e, walk, (number, position, ORDER, per)


@triton.jit  # noqa: RET503
def own(W, i: tl.constexpr, e, P: tl.constexpr):
    """Where weight i of P.STRIDES begins for adapter e; None if it is absent.

    Without a return statement, since Triton 3.6 cannot compile `return None`.
    """
    if W is not None:
        return W + tl.full((), P.STRIDES[i], tl.int64) * e


@triton.jit
def fill_others(part, parts, SOURCE, TO, ROUTE, ORDER, per, TABLE, T, WIDTH: tl.constexpr, P: tl.constexpr):
    """The rows of no adapter: those of SOURCE, or 0 if it is None; NaN where the id is not -1."""
    before, end = tl.load(TABLE), tl.load(TABLE + P.ADAPTERS)
    rest = before + T - end
    for tile in tl.range(part, tl.cdiv(rest, 16), parts):
        r = tile * 16 + tl.arange(0, 16)
        m_r = r < rest
        position = tl.where(r < before, r, r - before + end)
        row = tl.load(ORDER + position // per, mask=m_r, other=0) * per + position % per
        wrong = tl.load(ROUTE + position // per, mask=m_r, other=-1) != -1
        for b in tl.range(0, (WIDTH + 127) // 128):
            u = block(b, 128)
            m = m_r[:, None] & (u < WIDTH)[None, :]
            o = row[:, None] * WIDTH + u[None, :]
            if SOURCE is None:
                value = tl.zeros((16, 128), tl.float32)
            else:
                value = tl.load(SOURCE + o, mask=m, other=0.0).to(tl.float32)
            value = tl.where(wrong[:, None], float("nan"), value)
            tl.store(TO + o, value.to(TO.dtype.element_ty), mask=m)


@triton.jit
def fill_gradient(part, parts, G, DX, ROUTE, ORDER, per, TABLE, T, P: tl.constexpr):
    """The gradient of x in the rows of no adapter."""
    if DX is not None:
        SOURCE = G if P.OPTIONS.RESIDUAL else None
        fill_others(part, parts, SOURCE, DX, ROUTE, ORDER, per, TABLE, T, P.IN.N * P.IN.K, P)


@triton.jit(do_not_specialize=["T", "per"])
def bank_forward(
    X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, ROUTE, ORDER, TABLE, scale, T, per, P: tl.constexpr
):  # fmt: skip
    """`forward.forward`."""
    program = tl.program_id(0)
    fill_others(program, tl.num_programs(0), RESIDUAL, OUT, ROUTE, ORDER, per, TABLE, T, P.OUT.N * P.OUT.K, P)
    e, walk, tokens = share(program, 1, ORDER, per, TABLE, P)
    if e < P.ADAPTERS:
        forward_tiles(
            walk, X, RESIDUAL, OUT, own(A1, 0, e, P), own(S1, 1, e, P), own(T1, 2, e, P), own(B1, 3, e, P),
            own(A2, 4, e, P), own(S2, 5, e, P), own(T2, 6, e, P), own(B2, 7, e, P), scale, tokens, P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "per"])
def bank_forward_streamed(
    X, RESIDUAL, OUT, A1, S1, T1, B1, A2, S2, T2, B2, ROUTE, ORDER, TABLE, scale, T, per, P: tl.constexpr
):  # fmt: skip
    """`forward.forward_streamed`."""
    program = tl.program_id(0)
    fill_others(program, tl.num_programs(0), RESIDUAL, OUT, ROUTE, ORDER, per, TABLE, T, P.OUT.N * P.OUT.K, P)
    e, walk, tokens = share(program, 1, ORDER, per, TABLE, P)
    if e < P.ADAPTERS:
        streamed_tiles(
            walk, X, RESIDUAL, OUT, own(A1, 0, e, P), own(S1, 1, e, P), own(T1, 2, e, P), own(B1, 3, e, P),
            own(A2, 4, e, P), own(S2, 5, e, P), own(T2, 6, e, P), own(B2, 7, e, P), scale, tokens, P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "per"])
def bank_backward(
    X, G, DX, PART, A1, S1, T1, B1, A2, S2, T2, ROUTE, ORDER, TABLE, scale, T, per, P: tl.constexpr
):  # fmt: skip
    """`backward.backward`."""
    program = tl.program_id(0)
    fill_gradient(program, tl.num_programs(0), G, DX, ROUTE, ORDER, per, TABLE, T, P)
    e, walk, tokens = share(program, 1, ORDER, per, TABLE, P)
    if e < P.ADAPTERS:
        row = PART + program.to(tl.int64) * P.OFFSETS.ROW
        backward_tiles(
            walk, row, X, G, DX, own(A1, 0, e, P), own(S1, 1, e, P), own(T1, 2, e, P), own(B1, 3, e, P),
            own(A2, 4, e, P), own(S2, 5, e, P), own(T2, 6, e, P), scale, tokens, P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "per"])
def bank_tokens(
    X, G, Z, DV, DZ, V2, A1, S1, T1, B1, A2, S2, T2, DX, ROUTE, ORDER, TABLE, scale, T, per, P: tl.constexpr
):  # fmt: skip
    """`two_phase.tokens`."""
    if P.DENSE:
        fill_gradient(tl.program_id(0), tl.num_programs(0), G, DX, ROUTE, ORDER, per, TABLE, T, P)
    e, walk, tokens = share(tl.program_id(0), 1, ORDER, per, TABLE, P)
    if e < P.ADAPTERS:
        token_tiles(
            walk, X, G, Z, DV, DZ, V2, own(A1, 0, e, P), own(S1, 1, e, P), own(T1, 2, e, P), own(B1, 3, e, P),
            own(A2, 4, e, P), own(S2, 5, e, P), own(T2, 6, e, P), DX, scale, tokens, P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["per"])
def bank_sums(Z, DV, PART, A1, T1, B1, A2, S2, ORDER, TABLE, per, P: tl.constexpr):
    """`two_phase.sums`."""
    e, walk, tokens = share(tl.program_id(1), 1, ORDER, per, TABLE, P)
    if e < P.ADAPTERS:
        row = PART + tl.program_id(1).to(tl.int64) * P.OFFSETS.ROW
        sum_tiles(
            walk, row, tl.program_id(0), Z, DV, own(A1, 0, e, P), own(T1, 2, e, P), own(B1, 3, e, P),
            own(A2, 4, e, P), own(S2, 5, e, P), tokens, P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "per"])
def bank_columns(X, G, DX, DZ, V2, PART, S1, ROUTE, ORDER, TABLE, scale, T, per, P: tl.constexpr):
    """`two_phase.columns`."""
    N: tl.constexpr = P.IN.N if P.OPTIONS.IN_SIDE else P.OUT.N
    b, blocks = tl.program_id(0), tl.num_programs(0)
    program, programs = tl.program_id(1), tl.num_programs(1)
    if P.OPTIONS.IN_SIDE and not P.DENSE:
        fill_gradient(program * blocks + b, programs * blocks, G, DX, ROUTE, ORDER, per, TABLE, T, P)
    e, walk, tokens = share(program, N, ORDER, per, TABLE, P)
    if e < P.ADAPTERS:
        row = PART + program.to(tl.int64) * P.OFFSETS.ROW
        column_tiles(walk, row, b, X, G, DX, DZ, V2, own(S1, 1, e, P), None, 1, scale, tokens, P)
