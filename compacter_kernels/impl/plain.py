"""A kernel made of torch's own operations, which autograd and torch.compile can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from compacter_kernels.activations import Activation
from compacter_kernels.calls import AdapterCall, LinearCall
from compacter_kernels.impl import Gradients, Kernel
from compacter_kernels.impl.memory import Parameters, check_readable
from compacter_kernels.impl.precision import autocasts, without_autocast
from compacter_kernels.problem import Problem

C = TypeVar("C", LinearCall, AdapterCall)


class Plain(Generic[C]):
    """A `Kernel` that applies a function to the call."""

    differentiable, norms = True, False

    def __init__(self, problem: Problem, function: Callable[[C], Tensor]) -> None:
        self.function: Callable[[C], Tensor] = function
        self.parameters = Parameters(problem)

    def check(self, call: C) -> None:
        """Raise for a tensor without memory, which torch's own operations do not check."""
        check_readable(call.x, "x")
        if isinstance(call, AdapterCall) and call.residual is not None:
            check_readable(call.residual, "residual")
        self.parameters.readable(call.differentiable()[1:])

    def forward(self, call: C, out: Tensor | None = None) -> Tensor:
        if autocasts(call.x.device):
            with without_autocast(call.x.device):
                result = self.function(call)
        else:  # avoids the time to enter a context
            result = self.function(call)
        return result if out is None else out.copy_(result)

    def backward(self, call: C, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        """The gradients by autograd, for leaves that share the memory of the call's tensors."""
        leaves: list[Any] = [None if t is None else t.detach() for t in call.differentiable()]
        needed = [leaf.requires_grad_() for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
        with torch.enable_grad(), without_autocast(call.x.device):
            out = self.function(call.of(*leaves))
        grads = iter(torch.autograd.grad(out, needed, grad) if needed else ())
        return tuple(next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves)


def unavailable() -> str | None:
    """Why an impl of plain torch cannot run in this process: None, since it always can."""
    return None


def refuses(problem: Problem) -> str | None:
    """Why an impl of plain torch cannot serve the problem: None, since it serves every one."""
    return None


def plain_kernel(
    problem: Problem, linear: Callable[[LinearCall], Tensor], adapter: Callable[[AdapterCall, Activation], Tensor]
) -> Kernel[Any]:
    """The kernel for a problem, from the two functions of an impl of plain torch."""
    activation = problem.activation
    if activation is None:
        return Plain(problem, linear)
    return Plain(problem, lambda call: adapter(call, activation))
