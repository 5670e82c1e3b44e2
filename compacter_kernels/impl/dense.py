"""The paper, literally: build H, then multiply. The definition of the function, and the oracle of every test."""

from __future__ import annotations

from torch import Tensor

from compacter_kernels.activations import Activation
from compacter_kernels.impl.precision import without_autocast, working_dtype
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights, kronecker_sum


def unavailable() -> str | None:
    """Why this impl cannot run in this process; None, since it is plain torch."""
    return None


def refuses(problem: Problem) -> str | None:
    """Why this impl cannot serve the problem; None, since it serves every one."""
    return None


def _project(x: Tensor, weights: PHMWeights) -> Tensor:
    y = x @ kronecker_sum(weights, x.dtype)
    return y if weights.bias is None else y + weights.bias.to(x.dtype)


@without_autocast
def linear(x: Tensor, weights: PHMWeights) -> Tensor:
    """y = x H + b: x (..., in) -> (..., out), in x's dtype; computed in float32, or float64 for a float64 x."""
    return _project(x.to(working_dtype(x)), weights).to(x.dtype)


@without_autocast
def adapter(
    x: Tensor, down: PHMWeights, up: PHMWeights, activation: Activation, residual: Tensor | None, scale: float
) -> Tensor:
    """scale * up(act(down(x))) [+ residual]: (..., k) -> (..., k), in x's dtype."""
    wide = x.to(working_dtype(x))
    y = _project(activation.function(_project(wide, down)), up)
    if scale != 1.0:
        y = y * scale
    if residual is not None:
        y = y + (wide if residual is x else residual.to(wide.dtype))
    return y.to(x.dtype)
