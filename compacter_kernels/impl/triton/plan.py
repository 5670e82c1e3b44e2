"""Everything that a kernel knows when it is compiled, as one argument `P`: sizes, tiles, precision, options."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import triton.language as tl

from compacter_kernels.impl.triton.config import Config
from compacter_kernels.impl.triton.sizes import Offsets, Side, Sizes
from compacter_kernels.impl.triton.tiles import INTERPRETED


@dataclass(frozen=True)
class Precision:
    """How the products beside x are rounded.

    LP: the dtype of matrix operands. SPLIT: a factor is two of them. WIDE: the precision of float32 operands.
    MIDDLE: the same between the projections, where "bf16" rounds them.
    """

    LP: Any
    SPLIT: bool
    WIDE: str
    MIDDLE: str


@dataclass(frozen=True)
class Options:
    """What distinguishes two launches of a kernel on one problem.

    SAME: the residual is x. RESIDUAL: of the backward, g is added to dx. HAS_BIAS: the gradient of the up bias is wanted.
    IN_SIDE, OUT_SIDE: which rows the second phase of a backward works on.
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


def plan(s: Sizes, config: Config, precision: Precision, options: Options) -> Static:
    """The argument P of a kernel."""
    sizes = {field.name: getattr(s, field.name) for field in fields(s)}
    return Static(
        Plan(
            **sizes,
            SQUARE=s.square,
            O=s.offsets,
            BT=config.tokens,
            BK=config.columns,
            STAGES=config.stages,
            OPTIONS=options,
            PRECISION=precision,
        )
    )


def precision(s: Sizes, dtype: torch.dtype, architecture: str, tf32: bool = False) -> Precision:
    """How the products beside x of this dtype are rounded; tf32: the user lets float32 products be that.

    float16 goes through tf32, whose 10 bits hold it exactly and whose exponents hold every gradient. Between the
    projections a bfloat16 x is served with tf32 products, and from n = 8 on, where those would slow it down and the
    rounding of x itself weighs as much, with bfloat16 ones.
    """
    bf16 = dtype == torch.bfloat16
    products = "tf32x3" if dtype == torch.float32 and not tf32 else "tf32"
    if architecture.startswith("gfx"):
        products = "ieee"  # AMD's matrix units take float32 as it is
    middle = "bf16" if bf16 and s.IN.N >= 8 else products
    return Precision(tl.bfloat16 if bf16 else tl.float32, bf16, products, middle)
