"""LoKr (arXiv 2309.14859) from its factors, as the libraries that have it store them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compacter_kernels.functional import kronecker_linear
from compacter_kernels.impl.chain import chain, multiplied
from compacter_kernels.impl.plain import without_autocast
from compacter_kernels.weights import PHMWeights


def lokr_linear(
    x: Tensor, w1: Sequence[Tensor], w2: Sequence[Tensor], base: Tensor | None = None, scale: float | Tensor = 1.0
) -> Tensor:
    """base + scale * x (w1 (x) w2)^T, without a tensor of the size of w1 (x) w2.

    Args:
        x: (..., in), of any float dtype. The result is computed in float32, or in float64 for a
            float64 x.
        w1: one matrix (out_1, in_1), or two whose product it is; w2: the same with the sizes
            out/out_1 and in/in_1. In any float dtypes.
        base: (..., out) in x's dtype, or None.
        scale: a number, or a tensor of one number.

    Returns:
        (..., out), contiguous, in x's dtype.
    """
    rules = [part.mT[None] for part in reversed(w1)]
    factors: Sequence[Tensor] = [part.mT[None] for part in reversed(w2)]
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        factors = multiplied(factors, wide)
        if len(rules) == 2 and _numbers(rules) > _numbers(factors):  # w1 is the larger one, and stays apart
            rules, factors = ([part.to(wide) for part in side] for side in (rules, factors))
            y = chain(x, [rules[0] * scale, rules[1]], factors, 1.0, base)
            return y.to(x.dtype)
        rule = rules[0] if len(rules) == 1 else rules[0].to(wide) @ rules[1].to(wide)
    return kronecker_linear(x, PHMWeights(rule, *factors), base, scale)


def _numbers(matrices: Sequence[Tensor]) -> int:
    """How many numbers the product has."""
    return matrices[0].shape[1] * matrices[-1].shape[2]
