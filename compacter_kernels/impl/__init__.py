"""The implementations (impls). Each is one module, light to import, that imports no other impl.

An impl module has the three functions of `Impl`. Its `prepare` makes one `Kernel` for a problem.
The targets of csrc/ share `native`, dense and factored share `plain`, all share `memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from compacter_kernels.calls import Call
from compacter_kernels.private import evaluated_when_compiled
from compacter_kernels.problem import Problem

Gradients = tuple[Tensor | None, ...]


class Kernel(Protocol):
    """One operation for one problem. Tensors may be strided; only `out` is changed.

    differentiable: whether autograd differentiates forward, so that backward is not called.
    norms: whether forward and backward take a call with a norm.
    """

    differentiable: bool
    norms: bool

    def forward(self, call: Call, out: Tensor | None = None) -> Tensor:
        """The result, in `out` if given, which is contiguous and overlaps no input."""

    def backward(self, call: Call, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        """The gradients of call.differentiable(); None if unwanted.

        The gradient of a base or residual is grad itself. With a norm, it is norm.grad_rows after
        the call.
        """


class Impl(Protocol):
    """The interface of an implementation's module."""

    def unavailable(self) -> str | None:
        """Why the impl cannot run in this process, or None."""

    def refuses(self, problem: Problem) -> str | None:
        """Why the impl cannot serve this problem, or None."""

    def prepare(self, problem: Problem) -> Kernel:
        """Make the kernel for this problem, with all work that depends on the problem alone."""


def not_fused(problem: Problem) -> str | None:
    """Why no fused kernel serves this problem on any device, or None."""
    if problem.dtype == torch.float64:
        return "x is float64; the kernels compute in float32"
    if any(p.rank is None and p.terms for p in problem.projections):
        return "the weights are not factorised (right is None)"
    if problem.activation is not None and problem.activation.code is None:
        return f"the activation {problem.activation.name} is not fused"
    return None


@evaluated_when_compiled
def architecture(device: torch.device) -> str:
    """The architecture of a GPU, such as "sm_90" or "gfx942", or the type of another device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    name: str = getattr(properties, "gcnArchName", "")
    return name.split(":")[0] if torch.version.hip is not None else f"sm_{properties.major}{properties.minor}"


def empty_gradients(tensors: Sequence[Tensor | None], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """An uninitialised contiguous tensor for each wanted gradient."""
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
