"""The sizes of one problem as the kernels take them, and where each gradient lies in a row of partials."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from compacter_kernels.problem import Problem

FOLD_LIMIT = 16384  # elements of a folded matrix that a program holds
MIX_LIMIT = 16384  # elements of an unfolded rule
UNFOLDED_BYTES = 184320  # of shared memory, for a backward with an unfolded rule


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least both."""
    return max(least, 1 << (value - 1).bit_length())


class Sizes(NamedTuple):
    """What the kernels need to know of a problem; fields with capital letters are their compile-time arguments.

    1 is the input's side, 2 the output's. For a projection alone both have its phm_dim and rank.
    """

    N1: int
    R1: int
    K1: int
    D1: int
    N2: int
    R2: int
    K2: int
    D2: int
    E1: int
    E2: int
    NI1: int
    NI2: int
    NP1: int
    NP2: int
    DP: int
    ACTIVATION: int | None
    FOLD: bool

    @property
    def gradients(self) -> tuple[tuple[int, int], ...]:
        """(elements, copies) of left1, right2, bias2, rule1, right1, bias1, rule2, left2 in a row of partials."""
        n1, n2 = self.N1, self.N2
        middle = (0, 0, 0, 0)
        if self.ACTIVATION is not None:
            middle = (n1 * self.R1 * self.D1, n1 * self.D1, n2**3, n2 * self.R2 * self.D2)
        right1, bias1, rule2, left2 = middle
        return (
            (n1 * self.R1 * self.K1, 1),
            (n2 * self.R2 * self.K2, 1),
            (n2 * self.K2, 1),
            (n1**3, self.R1),
            (right1, 1),
            (bias1, 1),
            (rule2, self.R2),
            (left2, 1),
        )

    @property
    def offsets(self) -> dict[str, int]:
        """Where each of them but the first starts, and ROW, the length of a row."""
        names = ("O_T2", "O_B2", "O_A1", "O_T1", "O_B1", "O_A2", "O_S2", "ROW")
        found, offset = {}, 0
        for name, (elements, copies) in zip(names, self.gradients, strict=True):
            offset += elements * copies
            found[name] = offset
        found["ROW"] = -(-found["ROW"] // 4) * 4
        return found


def sizes(problem: Problem, fold: bool | None = None) -> Sizes:
    """The sizes of a problem. Columns (slices times rank) are padded so that every product has an inner size >= 16."""
    columns = 4 if operand(problem.dtype)[1] else 16
    first, last = problem.projections[0], problem.projections[-1]
    n1, n2 = first.phm_dim, last.phm_dim
    assert first.rank is not None
    assert last.rank is not None
    chunk1, chunk2 = first.in_features // n1, last.out_features // n2
    adapter = problem.activation is not None
    d1, d2 = (first.out_features // n1, last.in_features // n2) if adapter else (1, 1)
    np1, np2 = power_of_two(n1), power_of_two(n2)
    ni1 = power_of_two(max(n1 * first.rank, n1), max(columns, 16 // np1))
    ni2 = power_of_two(max(n2 * last.rank, n2), max(columns, 16 // np2))
    if fold is None:
        width = np1 * power_of_two(d1, 16 // np1) if adapter else np1 * ni1
        small = np1 * max(ni1, ni2) * width <= FOLD_LIMIT
        fold = n1 != n2 or (small and (n1 <= 8 or (adapter and operand(problem.dtype)[1])))
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
    return Sizes(n1, first.rank, chunk1, d1, n2, last.rank, chunk2, d2, e1, e2, ni1, ni2, np1, np2, dp, code, fold)


def too_large(s: Sizes) -> str | None:
    """Why a program could not hold the middle, or None."""
    if s.FOLD:
        width = s.DP if s.ACTIVATION is not None else s.NP1 * s.NI1
        held = max(s.NP1 * s.NI1, s.NP2 * s.NI2) * width
        limit = FOLD_LIMIT
    else:
        held, limit = max(s.NI1 * s.NP1**2, s.NI2 * s.NP2**2), MIX_LIMIT
    if held > limit:
        return f"phm_dim, phm_rank and bottleneck need {held} numbers on chip between the projections, over {limit}"
    return None


def operand(dtype: torch.dtype) -> tuple[str, bool]:
    """The dtype of matrix operands beside x of this dtype, and whether factors are split into two of them.

    float16 goes through tf32, whose 10 bits hold it exactly and whose exponents hold every gradient.
    """
    return {torch.bfloat16: ("bfloat16", True)}.get(dtype, ("float32", False))


def precision(s: Sizes, dtype: torch.dtype, architecture: str) -> dict[str, Any]:
    """The compile-time arguments that say how the products beside x of this dtype are rounded.

    Between the projections a bfloat16 x is served with tf32 products, and from n = 8 on, where those would slow it down
    and the rounding of x itself weighs as much, with bfloat16 ones.
    """
    lp, split = operand(dtype)
    products = "tf32x3" if dtype == torch.float32 else "tf32"
    if architecture.startswith("gfx"):
        products = "ieee"  # AMD's matrix units take float32 as it is
    middle = "bf16" if dtype == torch.bfloat16 and s.N1 >= 8 else products
    if not s.FOLD and middle == "tf32x3":
        middle = "ieee"  # the three parts of each operand would not fit the shared memory
    return {"LP": lp, "SPLIT": split, "PRECISION": products, "MIDDLE_PRECISION": middle}
