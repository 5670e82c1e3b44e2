"""The sizes of a problem for the kernels, and the offsets of the gradients in a row of partials."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from compacter_kernels.problem import Problem

FOLD_LIMIT = 16384  # the most elements of a folded matrix that a program can hold
FOLD_INNER = 64  # the most columns of a folded matrix with float32 operands
BLOCK = 64  # the most columns of a folded bottleneck that a program computes at once
BLOCK_BYTES = 8192  # the most bytes of a folded matrix, in x's dtype, for these columns
DENSE_LIMIT = 256  # the most numbers of a dense bottleneck
DENSE_BLOCK = 64  # the most of them whose gradients a program sums
MIX_LIMIT = 16384  # the most elements of an unfolded rule, padded, with a copy for each column
MAP_LIMIT = 4096  # the same of a rule that is not (n, n, n), since a larger one spills registers


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least value and least."""
    return max(least, 1 << (value - 1).bit_length())


@dataclass(frozen=True)
class Side:
    """The side of x or of the output, with its wide rows and its projection.

    N: phm_dim. R: rank. K: numbers of a wide chunk. D: numbers of a chunk of the bottleneck.
    E: D padded. NP: N padded. NI: the number of columns, C = N R, padded. DENSE: the projection is
    one matrix, the wide factor of n = 1 and as many ranks as columns. TURNED: it lies transposed in
    memory. TERMS, TO, TO_PADDED: the terms of the rule, and its width on the other side.
    """

    N: int
    R: int
    K: int
    D: int
    E: int
    NP: int
    NI: int
    DENSE: bool = False
    TURNED: bool = False
    TERMS: int = 0  # these three are N, N and NP where 0
    TO: int = 0
    TO_PADDED: int = 0

    @property
    def C(self) -> int:
        """The number of columns: slices of the rule times rank."""
        return (self.TERMS or self.N) * self.R

    @property
    def M(self) -> int:
        """The width of the rule on the other side."""
        return self.TO or self.N

    @property
    def MP(self) -> int:
        """M padded."""
        return self.TO_PADDED or self.NP

    @property
    def RULE(self) -> int:
        """The numbers of the rule."""
        return (self.TERMS or self.N) * self.N * self.M


@dataclass(frozen=True)
class Offsets:
    """The start of each gradient after left1 in a row of partials, and the length of the row."""

    T2: int
    B2: int
    A1: int
    T1: int
    B1: int
    A2: int
    S2: int
    ROW: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of a problem. If it is one projection, both sides have its phm_dim and rank.

    DP: the numbers of the bottleneck, padded. EB: those of a block. ACTIVATION: its code, or None
    for one projection. FOLD: see middle.py. ADAPTERS: those of a routed bank (bank.py), or 0.
    MIXED: those of a mixed bank (mixed.py), or 0.
    SHARED: whether all adapters have one rule, of x's side and of the output's.
    """

    IN: Side
    OUT: Side
    DP: int
    EB: int
    ACTIVATION: int | None
    FOLD: bool
    ADAPTERS: int
    MIXED: int
    SHARED: tuple[bool, ...]

    @property
    def DENSE(self) -> bool:
        """Whether both projections are dense matrices, with the activation alone between them."""
        return self.IN.DENSE

    @property
    def ROUTED(self) -> bool:
        """Whether each row belongs to an adapter of a bank."""
        return self.ADAPTERS > 0

    @property
    def PADDED(self) -> int:
        """The adapters and one more, padded."""
        return power_of_two(self.ADAPTERS + 1)

    @property
    def STRIDES(self) -> tuple[int, ...]:
        """The numbers between two adapters in down and up; 0 for a shared rule."""
        a, b = self.IN, self.OUT
        if self.DENSE:
            return 0, a.C * a.K, 0, a.C, 0, 0, b.C * b.K, b.K
        rules = [0 if shared else side.RULE for side, shared in zip((a, b), self.SHARED, strict=True)]
        return rules[0], a.C * a.K, a.C * a.D, a.N * a.D, rules[1], b.C * b.D, b.C * b.K, b.N * b.K

    @property
    def SQUARE(self) -> bool:
        """Whether x and the output have equal rows."""
        return (self.IN.N, self.IN.K) == (self.OUT.N, self.OUT.K)

    @property
    def K(self) -> int:
        """The length of the longer wide chunk."""
        return max(self.IN.K, self.OUT.K)

    @property
    def inner(self) -> int:
        """The padded numbers of a token between x and the bottleneck."""
        return self.IN.NP * self.IN.NI

    @property
    def blocks(self) -> int:
        """The number of blocks of the bottleneck."""
        return self.DP // self.EB

    @property
    def gradients(self) -> tuple[tuple[int, int], ...]:
        """(elements, copies) of each gradient, in the order of a row of partials (partials.py).

        A rule has a copy for each rank index, a factor of the bottleneck one for each block.
        """
        a, b, blocks = self.IN, self.OUT, self.blocks
        wide_and_rule = ((a.C * a.K, 1), (b.C * b.K, 1), (b.N * b.K, 1), (a.RULE, a.R))
        if self.DENSE:
            return (*wide_and_rule[:3], (0, 1), (0, 1), (a.C, 1), (0, 1), (0, 1))
        if self.ACTIVATION is None:
            return (*wide_and_rule, (0, blocks), (0, 1), (0, b.R), (0, blocks))
        return (*wide_and_rule, (a.C * a.D, blocks), (a.N * a.D, 1), (b.RULE, b.R), (b.C * b.D, blocks))

    @property
    def sums(self) -> tuple[bool, ...]:
        """Of which side the launches of `two_phase.sums` are: x's if True, else the output's."""
        if self.DENSE:
            return ()
        return (True,) if self.FOLD or self.ACTIVATION is None else (True, False)

    @property
    def PARTS(self) -> int:
        """The blocks of a dense bottleneck in `two_phase.columns`."""
        return max(1, self.IN.NI // DENSE_BLOCK) if self.DENSE else 1

    @property
    def OFFSETS(self) -> Offsets:
        """The starts of the gradients and the length of a row, which is a multiple of 4."""
        ends = list(accumulate(elements * copies for elements, copies in self.gradients))
        ends[-1] += -ends[-1] % 4
        return Offsets(*ends)


def kronecker_sizes(problem: Problem) -> Sizes:
    """The sizes of one projection whose rule is (terms, n_in, n_out)."""
    p, bf16 = problem.projections[0], problem.dtype == torch.bfloat16
    assert p.rank is not None
    np1, np2 = power_of_two(p.n_in), power_of_two(p.n_out)
    # The bias has n_out of the columns (tiles.v_operand).
    most = max(p.terms * p.rank, 1 if p.dtypes[-1] is None else p.n_out)
    ni = power_of_two(most, max(4 if bf16 else 8, 16 // min(np1, np2)))
    gains = max(p.n_in, p.n_out) <= 8 if bf16 else max(np1, np2) * ni <= FOLD_INNER
    fold = np1 * np2 * ni * ni <= FOLD_LIMIT and gains
    if not fold:
        np1, np2, ni = max(np1, 16), max(np2, 16), max(ni, 16)
    k1, k2 = p.in_features // p.n_in, p.out_features // p.n_out
    x_side = Side(p.n_in, p.rank, k1, 1, 1, np1, ni, TERMS=p.terms, TO=p.n_out, TO_PADDED=np2)
    out_side = Side(p.n_out, p.rank, k2, 1, 1, np2, ni, TERMS=p.terms, TO=p.n_in, TO_PADDED=np1)
    return Sizes(x_side, out_side, 16, 16, None, fold, 0, 0, (False, False))


def dense_sizes(problem: Problem, turned: tuple[bool, ...], routed: int, mixed: int) -> Sizes:
    """The sizes of a bottleneck adapter."""
    k, d = problem.projections[0].in_features, problem.projections[0].out_features
    code = problem.activation.code if problem.activation is not None else None
    padded = power_of_two(d, 16)
    down, up = (Side(1, d, k, 1, 1, 1, padded, True, transposed) for transposed in turned)
    return Sizes(down, up, padded, padded, code, False, routed, mixed, (False, False))


def sizes(problem: Problem, backward: bool = False, turned: tuple[bool, ...] = (False, False)) -> Sizes:
    """The sizes of a problem. Columns are padded to powers of two, and NP NI to at least 16.

    A folded matrix is n^2 r wide. With float32 operands it takes too many registers beyond n = 8
    and rank 1. With bfloat16 operands beyond n = 8, only the forward of an adapter gains by it.
    """
    bank = problem.bank
    adapters, shared = (0, (False, False)) if bank is None else (bank.adapters, bank.shared_rules)
    routed, mixed = (0, adapters) if bank is not None and bank.mixed else (adapters, 0)
    if problem.operation == "bottleneck":
        return dense_sizes(problem, turned, routed, mixed)
    if problem.projections[0].phm_dim is None:
        return kronecker_sizes(problem)
    bf16 = problem.dtype == torch.bfloat16
    columns = 4 if bf16 else 8
    first, last = problem.projections[0], problem.projections[-1]
    n1, n2 = first.phm_dim, last.phm_dim
    assert n1 is not None and n2 is not None and first.rank is not None and last.rank is not None
    adapter = problem.activation is not None
    d1, d2 = (first.out_features // n1, last.in_features // n2) if adapter else (1, 1)
    np1, np2 = power_of_two(n1), power_of_two(n2)
    ni1 = power_of_two(max(n1 * first.rank, n1), max(columns, 16 // np1))
    ni2 = power_of_two(max(n2 * last.rank, n2), max(columns, 16 // np2))
    width = np1 * power_of_two(d1, 16 // np1) if adapter else np1 * ni1
    small = np1 * max(ni1, ni2) * width <= FOLD_LIMIT
    gains = n1 <= 8 or (adapter and not backward) if bf16 else np1 * max(ni1, ni2) <= FOLD_INNER
    fold = n1 != n2 or (small and gains)
    e1, e2 = d1, d2
    if fold and n1 == n2:
        e1 = e2 = power_of_two(d1, 16 // np1)
        dp = np1 * e1
    elif fold:
        dp = power_of_two(n1 * d1, 16)
    else:
        dp = power_of_two(max(d1, d2), 16)
        np1 = np2 = max(np1, 16)
        ni1, ni2 = max(ni1, 16), max(ni2, 16)
    code = problem.activation.code if problem.activation is not None else None
    side1 = Side(n1, first.rank, first.in_features // n1, d1, e1, np1, ni1)
    side2 = Side(n2, last.rank, last.out_features // n2, d2, e2, np2, ni2)
    # Blocks divide the bottleneck only if its chunks are powers of two.
    most = min(BLOCK, BLOCK_BYTES // problem.dtype.itemsize // (np1 * max(ni1, ni2)))
    if mixed and not bf16 and np1 > 4:  # n <= 4 leaves registers for the loop over adapters
        most //= 2
    block = min(dp, max(most, e1, 16)) if fold and n1 == n2 else dp
    return Sizes(side1, side2, dp, block, code, fold, routed, mixed, shared)


def too_large(s: Sizes) -> str | None:
    """Why a program could not hold the middle, or None."""
    sides = (s.IN, s.OUT)
    if s.DENSE:
        return f"the bottleneck has {s.IN.C} numbers, over {DENSE_LIMIT}" if s.IN.C > DENSE_LIMIT else None
    if s.FOLD:
        width = s.DP if s.ACTIVATION is not None else s.OUT.NP * s.OUT.NI
        held, limit = max(side.NP * side.NI for side in sides) * width, FOLD_LIMIT
    else:
        held = max(side.NI * side.NP * side.MP for side in sides)
        limit = MAP_LIMIT if s.IN.TERMS else MIX_LIMIT
    if held > limit:
        return f"phm_dim, phm_rank and bottleneck need {held} numbers on chip between the projections, over {limit}"
    return None
