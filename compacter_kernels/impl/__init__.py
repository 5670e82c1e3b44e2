"""The implementations. Each is a module of its own, light to import; none imports another.

An impl module has the three functions of `Impl`; what `prepare` returns is a `Kernel`, made once for a problem.
`native` is what the targets of csrc/ share, `plain` what dense and factored share; `memory` and `precision` serve both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from compacter_kernels.calls import Call
from compacter_kernels.private import constant_when_compiled
from compacter_kernels.problem import Problem

Gradients = tuple[Tensor | None, ...]
C = TypeVar("C", bound=Call, contravariant=True)


class Kernel(Protocol[C]):
    """One operation for one problem. Tensors may be strided; none is changed but `out`.

    differentiable: whether autograd sees through forward, which then is all that is called.
    norms: whether forward and backward take a call with a norm.
    """

    differentiable: bool
    norms: bool

    def forward(self, call: C, out: Tensor | None = None) -> Tensor:
        """The result, in `out` where one is given: contiguous, and apart from all that is read."""

    def backward(self, call: C, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        """The gradients of x, then of rule, left, right, bias of each projection; None where not wanted.

        The gradient of a residual is grad itself; behind a norm it is what the norm's grad_rows then hold.
        """


class Impl(Protocol):
    """What the module of an implementation has."""

    def unavailable(self) -> str | None:
        """Why it cannot run in this process, or None."""

    def refuses(self, problem: Problem) -> str | None:
        """Why it cannot serve this problem, or None."""

    def prepare(self, problem: Problem) -> Kernel[Any]:
        """The kernel for this problem. What depends on the problem alone is done here, once."""


def not_fused(problem: Problem) -> str | None:
    """Why no fused kernel serves this problem on any device, or None."""
    if problem.dtype == torch.float64:
        return "x is float64; the kernels compute in float32"
    if any(p.rank is None for p in problem.projections):
        return "the weights are not factorised (right is None)"
    if problem.activation is not None and problem.activation.code is None:
        return f"the activation {problem.activation.name} is not fused"
    return None


@constant_when_compiled
def architecture(device: torch.device) -> str:
    """The name of a device's architecture: "sm_90", "gfx942"; of any but a GPU the device's type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    name: str = getattr(properties, "gcnArchName", "")
    return name.split(":")[0] if torch.version.hip is not None else f"sm_{properties.major}{properties.minor}"


def empty_gradients(tensors: Sequence[Tensor | None], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """An uninitialised contiguous tensor for each gradient that is wanted."""
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
