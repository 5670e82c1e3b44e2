"""The definition in the paper: build H, then multiply. Every test compares with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compacter_kernels.activations import Activation
from compacter_kernels.calls import AdapterCall, LinearCall
from compacter_kernels.impl import Kernel
from compacter_kernels.impl.plain import plain_kernel, refuses as refuses, unavailable as unavailable
from compacter_kernels.impl.precision import working_dtype
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights, kronecker_sum


def _project(x: Tensor, weights: PHMWeights) -> Tensor:
    y = x @ kronecker_sum(weights, x.dtype)
    return y if weights.bias is None else y + weights.bias.to(x.dtype)


def linear(call: LinearCall) -> Tensor:
    """y = x H + b, x (..., in) -> (..., out) in x's dtype, computed in `working_dtype(x)`."""
    x, weights = call
    return _project(x.to(working_dtype(x)), weights).to(x.dtype)


def adapter(call: AdapterCall, activation: Activation) -> Tensor:
    """scale * up(act(down(x))) [+ x] [+ residual], (..., k) -> (..., k) in x's dtype."""
    wide = call.x.to(working_dtype(call.x))
    y = _project(activation.function(_project(wide, call.down)), call.up)
    if call.scale != 1.0:
        y = y * call.scale
    if call.add_x:
        y = y + wide
    if call.residual is not None:
        y = y + call.residual.to(wide.dtype)
    return y.to(call.x.dtype)


def prepare(problem: Problem) -> Kernel[Any]:
    """The kernel for this problem."""
    return plain_kernel(problem, linear, adapter)
