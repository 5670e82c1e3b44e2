"""Kernels made of torch's own operations, which autograd and torch.compile can see.

They compute in float32, as the fused kernels do, with one final rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from compacter_kernels.calls import Call, LinearCall
from compacter_kernels.impl import Gradients
from compacter_kernels.impl.memory import Parameters, check_readable
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this type of device."""
    kind = device.type
    return bool(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast for this type of device: matmuls keep their own dtype."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def wide(x: Tensor) -> Tensor:
    """x in float64 if it is float64, else in float32, so that H never has low precision."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class Plain:
    """A `Kernel` of plain torch.

    rows: returns x, (..., in), as the wide tensor that project takes. project: x H + b.
    """

    differentiable, norms = True, False

    def __init__(
        self, problem: Problem, rows: Callable[[Tensor], Tensor], project: Callable[[Tensor, PHMWeights], Tensor]
    ) -> None:
        self.rows, self.project = rows, project
        self.activation = None if problem.activation is None else problem.activation.function
        self.parameters = Parameters(problem)

    def check(self, call: Call) -> None:
        """Raise for a tensor without memory, which torch's own operations do not check."""
        check_readable(call.x, "x")
        if not isinstance(call, LinearCall) and call.residual is not None:
            check_readable(call.residual, "residual")
        self.parameters.readable(call.differentiable()[1:])

    def forward(self, call: Call, out: Tensor | None = None) -> Tensor:
        if autocasts(call.x.device):
            with without_autocast(call.x.device):
                result = self._compute(call)
        else:  # avoids the time to enter a context
            result = self._compute(call)
        return result if out is None else out.copy_(result)

    def backward(self, call: Call, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        """The gradients by autograd, for leaves that share the memory of the call's tensors."""
        call = call.map(Tensor.detach)
        leaves = call.differentiable()
        needed = [leaf.requires_grad_() for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
        with torch.enable_grad(), without_autocast(call.x.device):
            out = self._compute(call)
        grads = iter(torch.autograd.grad(out, needed, grad) if needed else ())
        return tuple(next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves)

    def _compute(self, call: Call) -> Tensor:
        x, rows = call.x, self.rows(call.x)
        if isinstance(call, LinearCall):
            y = self.project(rows, call.weights)
        else:
            assert self.activation is not None
            y = self.project(self.activation(self.project(rows, call.down)), call.up)
            if call.scale != 1.0:
                y = y * call.scale
            if call.add_x:
                y = y + rows
            if call.residual is not None:
                y = y + self.rows(call.residual)
        y = y.to(x.dtype)
        return y if y.ndim == x.ndim else y.reshape(*x.shape[:-1], y.shape[-1])


def unavailable() -> str | None:
    """Why an impl of plain torch cannot run in this process: None, since it always can."""
    return None


def refuses(problem: Problem) -> str | None:
    """Why an impl of plain torch cannot serve the problem: None, since it serves every one."""
    return None
