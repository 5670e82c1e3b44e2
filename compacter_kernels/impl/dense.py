"""The definition in the paper: build H, then multiply. Every test compares with it."""

from __future__ import annotations

from torch import Tensor

from compacter_kernels.impl import Kernel
from compacter_kernels.impl.plain import Plain, refuses as refuses, unavailable as unavailable, wide
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights, kronecker_sum


def _project(x: Tensor, weights: PHMWeights) -> Tensor:
    y = x @ kronecker_sum(weights, x.dtype)
    return y if weights.bias is None else y + weights.bias.to(x.dtype)


def prepare(problem: Problem) -> Kernel:
    """The kernel for this problem."""
    return Plain(problem, wide, _project)
