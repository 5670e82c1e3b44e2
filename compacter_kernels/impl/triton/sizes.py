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
MIX_LIMIT = 16384  # the most elements of an unfolded rule


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least value and least."""
    return max(least, 1 << (value - 1).bit_length())


@dataclass(frozen=True)
class Side:
    """The side of x or of the output, with its wide rows and its projection.

    N: phm_dim. R: rank. K: numbers of a wide chunk. D: numbers of a chunk of the bottleneck.
    E: D padded. NP: N padded. NI: the number of columns, C = N R, padded.
    """

    N: int
    R: int
    K: int
    D: int
    E: int
    NP: int
    NI: int

    @property
    def C(self) -> int:
        """The number of columns: slices of the rule times rank."""
        return self.N * self.R


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
    for one projection. FOLD: see middle.py.
    """

    IN: Side
    OUT: Side
    DP: int
    EB: int
    ACTIVATION: int | None
    FOLD: bool

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
        wide_and_rule = ((a.C * a.K, 1), (b.C * b.K, 1), (b.N * b.K, 1), (a.N**3, a.R))
        if self.ACTIVATION is None:
            return (*wide_and_rule, (0, blocks), (0, 1), (0, b.R), (0, blocks))
        return (*wide_and_rule, (a.C * a.D, blocks), (a.N * a.D, 1), (b.N**3, b.R), (b.C * b.D, blocks))

    @property
    def OFFSETS(self) -> Offsets:
        """The starts of the gradients and the length of a row, which is a multiple of 4."""
        ends = list(accumulate(elements * copies for elements, copies in self.gradients))
        ends[-1] += -ends[-1] % 4
        return Offsets(*ends)


def sizes(problem: Problem, backward: bool = False) -> Sizes:
    """The sizes of a problem. Columns are padded to powers of two, and NP NI to at least 16.

    A folded matrix is n^2 r wide. With float32 operands it takes too many registers beyond n = 8
    and rank 1. With bfloat16 operands beyond n = 8, only the forward of an adapter gains by it.
    """
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
    block = min(dp, max(most, e1, 16)) if fold and n1 == n2 else dp
    return Sizes(side1, side2, dp, block, code, fold)


def too_large(s: Sizes) -> str | None:
    """Why a program could not hold the middle, or None."""
    sides = (s.IN, s.OUT)
    if s.FOLD:
        width = s.DP if s.ACTIVATION is not None else s.inner
        held, limit = max(side.NP * side.NI for side in sides) * width, FOLD_LIMIT
    else:
        held, limit = max(side.NI * side.NP**2 for side in sides), MIX_LIMIT
    if held > limit:
        return f"phm_dim, phm_rank and bottleneck need {held} numbers on chip between the projections, over {limit}"
    return None
