"""A function made of torch's own operations as a kernel: autograd and torch.compile see through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from compacter_kernels.calls import AdapterCall, LinearCall
from compacter_kernels.impl import Gradients
from compacter_kernels.impl.precision import without_autocast

C = TypeVar("C", LinearCall, AdapterCall)


class Plain(Generic[C]):
    """A `Kernel` of a function of the call."""

    differentiable, norms = True, False

    def __init__(self, function: Callable[[C], Tensor]) -> None:
        self.function: Callable[[C], Tensor] = function

    def forward(self, call: C, out: Tensor | None = None) -> Tensor:
        with without_autocast(call.x.device):
            result = self.function(call)
        return result if out is None else out.copy_(result)

    def backward(self, call: C, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        """By autograd, from leaves that share the memory of the call's tensors."""
        leaves: list[Any] = [None if t is None else t.detach() for t in call.differentiable()]
        needed = [leaf.requires_grad_() for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
        with torch.enable_grad(), without_autocast(call.x.device):
            out = self.function(call.of(*leaves))
        found = iter(torch.autograd.grad(out, needed, grad) if needed else ())
        return tuple(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves)
