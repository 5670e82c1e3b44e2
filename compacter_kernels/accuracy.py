"""The accuracy contract: the error of an impl against `dense` evaluated in float64.

The contract covers the output and every gradient, and is the same on every machine and for every
shape. The error of a tensor may be at most twice the error of `dense` in the same dtypes, or
`floor`, whichever is larger. Where an impl rounds the operands of its products to the dtype of x
(OPERANDS_LIKE_X), the floor of the dtype of x holds for the gradients of wider parameters too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from compacter_kernels.cases import Inputs, Tensors, call
from compacter_kernels.dispatch import IMPLS

Function = Callable[[Inputs], Tensor]
DENSE: Function = call("dense")


def run(inputs: Inputs, function: Function) -> Tensors:
    """Return the output as "out", and the gradient of each tensor that requires one by its name."""
    out = function(inputs)
    wanted = {name: tensor for name, tensor in inputs.tensors().items() if tensor.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), inputs.grad.detach()) if wanted else ()
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def evaluate(inputs: Inputs, function: Function, gradients: bool = True) -> Tensors:
    """The same on copies of the inputs, with the gradients of all tensors or of none."""
    copied = inputs.map(lambda t: t.detach().clone().requires_grad_(gradients))
    with torch.set_grad_enabled(gradients):
        return run(copied, function)


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest number of `exact`; infinite if that is no number."""
    if got.shape != exact.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    got = got.detach().to(torch.float64)
    largest = exact.abs().max().item()
    difference = (got - exact).abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / largest if largest > 0 else difference


def floor(dtype: torch.dtype, working: torch.dtype) -> float:
    """Return the error that rounding alone may cause in a tensor of `dtype`.

    working: the dtype of the computation, float32 or float64.

    Writing the result rounds it by half a unit in its last place. A whole unit is allowed, because
    the error of the working dtype can move a value across a rounding boundary. A sum of N rounded
    terms has an expected error of sqrt(N)/2 units of the working dtype. 32 units allow for 4096
    terms, which an implementation may add in one run before it should add partial sums. Neither
    number depends on the shape.
    """
    return max(torch.finfo(dtype).eps, 32 * torch.finfo(working).eps)


class Deviation(NamedTuple):
    """The error of one tensor, and the limit of the contract."""

    tensor: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        """Return whether the error is within the limit; False for NaN."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.tensor}: error {self.error:.2g}, limit {self.limit:.2g}"


class Oracle:
    """The float64 results of a call and the limits, computed once for all implementations.

    definition: the function that is evaluated in float64. exact: its results. limits: the largest
    error of each tensor. dtypes: those of the tensors that the results belong to.
    """

    def __init__(self, inputs: Inputs, gradients: bool = True, definition: Function = DENSE) -> None:
        self.inputs, self.gradients = inputs, gradients
        self.exact = evaluate(inputs.map(lambda t: t.to(torch.float64)), definition, gradients)
        dense = evaluate(inputs, definition, gradients)
        working = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
        self.limits = {name: max(2 * error(t, self.exact[name]), floor(t.dtype, working)) for name, t in dense.items()}
        self.dtypes = {"out": inputs.x.dtype, **{name: t.dtype for name, t in inputs.tensors().items()}}
        self.floor = floor(inputs.x.dtype, working)

    def check(self, function: Function, gradients: bool = True, impl: str = "") -> list[Deviation]:
        """Return the errors of a function through `impl`, without gradients that of the output."""
        return self.compare(evaluate(self.inputs, function, gradients and self.gradients), impl)

    def compare(self, got: Mapping[str, Tensor], impl: str = "") -> list[Deviation]:
        """Return the errors of what `evaluate` gave for `impl`; infinite where a dtype is wrong."""
        least = self.floor if getattr(IMPLS.get(impl), "OPERANDS_LIKE_X", False) else 0.0
        errors = {
            name: error(t, self.exact[name]) if t.dtype == self.dtypes[name] else math.inf for name, t in got.items()
        }
        return [Deviation(name, off, max(self.limits[name], least)) for name, off in errors.items()]
