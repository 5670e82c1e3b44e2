"""The compile-time argument `P` of a kernel: sizes, tiles, precision and options."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace
from typing import Any, NamedTuple

import torch
import triton.language as tl

from compacter_kernels.impl.triton.config import Config, configurations
from compacter_kernels.impl.triton.sizes import Sizes, sizes
from compacter_kernels.impl.triton.tiles import INTERPRETED
from compacter_kernels.problem import Problem


@dataclass(frozen=True)
class Precision:
    """The rounding of products; "bf16" rounds their operands.

    LP: the dtype of matrix operands that meet x. SPLIT: whether a factor is two of them. WIDE: the
    precision of float32 operands that meet x. MIDDLE: that between the projections, except SUMS for
    the sums over tokens, BEYOND from the bottleneck to dZ and V2. TURN: see `tiles.add_turned`.
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
    """The options in which two launches of a kernel on one problem may differ.

    SAME: the residual is x. RESIDUAL: backward adds g to dx. HAS_BIAS: the gradient of the up bias
    is wanted. IN_SIDE, OUT_SIDE: the sides that the second phase of a backward computes.
    """

    SAME: bool = False
    RESIDUAL: bool = False
    HAS_BIAS: bool = False
    IN_SIDE: bool = True
    OUT_SIDE: bool = True


@dataclass(frozen=True)
class Plan(Sizes):
    """The problem and the configuration of a kernel (sizes.py, config.py).

    BT: tokens of a tile, or rows in a second phase. BK: wide columns that are computed at once.
    """

    BT: int
    BK: int
    STAGES: int
    OPTIONS: Options
    PRECISION: Precision


@dataclass(frozen=True, repr=False)
class Static:
    """A dataclass as a compile-time argument, with attributes that are compile-time values too."""

    _values: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._values, name)
        if is_dataclass(value):
            value = Static(value)
        return value if INTERPRETED.value else tl.constexpr(value)

    def __repr__(self) -> str:
        return repr(self._values)


def plan(s: Sizes, config: Config, rounding: Precision, options: Options) -> Static:
    """The argument P of a kernel."""
    tiles: dict[str, Any] = {"BT": config.tokens, "BK": config.columns, "STAGES": config.stages}
    return Static(Plan(**vars(s), **tiles, OPTIONS=options, PRECISION=rounding))


class Served(NamedTuple):
    """The sizes, precision and configurations, best first, of a kernel that serves a problem."""

    sizes: Sizes
    precision: Precision
    configs: tuple[Config, ...]


def served(problem: Problem, architecture: str, turned: tuple[bool, ...] = (False, False)) -> dict[str, Served]:
    """The kernels that serve a problem on an architecture, by their names.

    turned: which dense projections lie transposed in memory.
    """
    fore, back = sizes(problem, False, turned), sizes(problem, True, turned)
    kernels = {}
    for name, configs in configurations(fore, back, problem.dtype, architecture).items():
        s = fore if name.startswith("forward") or name == "middle" else back
        if name == "forward":
            s = replace(s, EB=s.DP)  # one block, since the weights stay in registers
        kernels[name] = Served(s, precision(name, s, problem.dtype, architecture), configs)
    return kernels


# MIDDLE and SUMS of float32 products in a backward without folding, such that no register spills.
# The tensor memory of sm_100 cannot hold the six products of bf16x6: the compiler emits a trap.
UNFOLDED = {
    "sm_90": ("tf32x3", "tf32x3"),
    "sm_100": ("tf32x3", "tf32x3"),
    "sm_120": ("bf16x6", "tf32x3"),
}


def precision(kernel: str, s: Sizes, dtype: torch.dtype, architecture: str) -> Precision:
    """The rounding of a kernel's products for x of this dtype.

    A float32 product is three tf32 or six bfloat16 products, whichever need fewer registers; AMD's
    matrix units compute it directly. float16 is multiplied as float32: tf32 has as many bits, but
    what meets x has more, and a tensor core truncates them. Between the projections bfloat16 uses
    tf32, or bfloat16 if tf32 needs too many registers (a folded rule with n >= 8, and dZ and V2 in
    `backward`): there the rounding of x weighs as much. With the most columns, the tf32 parts of V
    do not fit into the shared memory of sm_90, and those of bfloat16 do.
    """
    bf16 = dtype == torch.bfloat16
    wide = "tf32" if bf16 else "tf32x3"
    if architecture.startswith("gfx"):
        wide = "ieee"
    middle = totals = wide
    if bf16 and s.FOLD and s.IN.N >= 8:
        middle = totals = "bf16"
    elif wide == "tf32x3" and not s.FOLD and kernel in ("tokens", "sums"):
        middle, totals = UNFOLDED.get(architecture, ("bf16x6", "bf16x6"))
    if architecture == "sm_90" and wide == "tf32x3" and kernel in ("forward_streamed", "expand") and s.inner > 512:
        wide = "bf16x6"
    beyond = "bf16" if kernel == "backward" else middle
    turn = architecture.startswith("gfx") and dtype.itemsize == 2
    return Precision(tl.bfloat16 if bf16 else tl.float32, bf16 and not s.DENSE, wide, middle, totals, beyond, turn)
