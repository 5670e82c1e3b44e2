"""Everything that a kernel knows when it is compiled, as one argument `P`: sizes, tiles, precision, options."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
import triton.language as tl

from compacter_kernels.impl.triton.config import Config, configurations
from compacter_kernels.impl.triton.sizes import Offsets, Side, Sizes, sizes
from compacter_kernels.impl.triton.tiles import INTERPRETED
from compacter_kernels.problem import Problem


@dataclass(frozen=True)
class Precision:
    """How the products beside x are rounded.

    LP: the dtype of matrix operands. SPLIT: a factor is two of them. WIDE: the precision of float32 operands.
    MIDDLE: the same between the projections, where "bf16" rounds them; SUMS: of the sums over tokens there; BEYOND: of
    the products that lead from the bottleneck to dZ and V2. TURN: as `tiles.output` has it.
    """

    LP: Any
    SPLIT: bool
    WIDE: str
    MIDDLE: str
    SUMS: str
    BEYOND: str
    TURN: bool


@dataclass(frozen=True)
class Options:
    """What distinguishes two launches of a kernel on one problem.

    SAME: the residual is x. RESIDUAL: in the backward, g is added to dx. HAS_BIAS: the up bias's gradient is wanted.
    IN_SIDE, OUT_SIDE: which side the second phase of a backward works on.
    """

    SAME: bool = False
    RESIDUAL: bool = False
    HAS_BIAS: bool = False
    IN_SIDE: bool = True
    OUT_SIDE: bool = True


@dataclass(frozen=True)
class Plan:
    """What a kernel knows of its problem and of its configuration (sizes.py, config.py).

    BT: tokens in a tile, in a second phase rows. BK: wide columns worked on at once.
    O: where the gradients lie in a row of partials. SQUARE: x and the output have the same rows.
    """

    IN: Side
    OUT: Side
    DP: int
    EB: int
    ACTIVATION: int | None
    FOLD: bool
    SQUARE: bool
    O: Offsets
    BT: int
    BK: int
    STAGES: int
    OPTIONS: Options
    PRECISION: Precision


class Static:
    """A dataclass as a kernel's compile-time argument: its attributes are compile-time values too."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._values, name)
        if is_dataclass(value):
            value = Static(value)
        return value if INTERPRETED.value else tl.constexpr(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


def plan(s: Sizes, config: Config, rounding: Precision, options: Options) -> Static:
    """The argument P of a kernel."""
    return Static(
        Plan(
            **{field.name: getattr(s, field.name) for field in fields(s)},
            SQUARE=s.square,
            O=s.offsets,
            BT=config.tokens,
            BK=config.columns,
            STAGES=config.stages,
            OPTIONS=options,
            PRECISION=rounding,
        )
    )


class Served(NamedTuple):
    """A kernel that serves a problem: with which sizes, precision, and configurations, best first."""

    sizes: Sizes
    precision: Precision
    configs: tuple[Config, ...]


def served(problem: Problem, architecture: str) -> dict[str, Served]:
    """The kernels that serve a problem on an architecture, by their names."""
    found, back = sizes(problem), sizes(problem, backward=True)
    kernels = {}
    for name, configs in configurations(found, back, problem.dtype, architecture).items():
        s = found if name.startswith("forward") else back
        if name == "forward":
            s = replace(s, EB=s.DP)  # the weights stay in registers, so there is nothing to gain by blocks
        kernels[name] = Served(s, precision(name, s, problem.dtype, architecture), configs)
    return kernels


# of float32 products in a backward whose rule is not folded, MIDDLE and SUMS: what spills nothing there. On sm_100 the
# tensor memory does not hold the six products of bf16x6, and the compiler makes the kernel a trap.
UNFOLDED = {
    "sm_90": ("tf32x3", "tf32x3"),
    "sm_100": ("tf32x3", "tf32x3"),
    "sm_120": ("bf16x6", "tf32x3"),
}


def precision(kernel: str, s: Sizes, dtype: torch.dtype, architecture: str) -> Precision:
    """How a kernel rounds the products beside x of this dtype.

    float32 is computed from three tf32 or six bfloat16 products, whichever takes fewer registers, and on AMD's matrix
    units as it is. float16 goes through tf32, whose 10 bits hold it exactly and whose exponents hold every gradient.
    Between the projections a bfloat16 x is served with tf32 products, and with bfloat16 ones where those would take too
    many registers, the rounding of x itself weighing as much: for a folded rule from n = 8 on, and to dZ and V2 in
    `backward`.
    """
    bf16 = dtype == torch.bfloat16
    wide = "tf32x3" if dtype == torch.float32 else "tf32"
    if architecture.startswith("gfx"):
        wide = "ieee"
    middle = totals = wide
    if bf16 and s.FOLD and s.IN.N >= 8:
        middle = totals = "bf16"
    elif wide == "tf32x3" and not s.FOLD and kernel in ("tokens", "sums"):
        middle, totals = UNFOLDED.get(architecture, ("bf16x6", "bf16x6"))
    beyond = "bf16" if kernel == "backward" else middle
    turn = architecture.startswith("gfx") and dtype.itemsize == 2
    return Precision(tl.bfloat16 if bf16 else tl.float32, bf16, wide, middle, totals, beyond, turn)
