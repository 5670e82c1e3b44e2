"""The implementations. Each is a module of its own, light to import; none imports another.

Every impl module has `unavailable()` and `refuses(problem)`. Plain-torch impls then have `linear` and `adapter`, which
autograd differentiates by itself; fused ones have `prepare(problem)`, which returns a `LinearKernel` or an
`AdapterKernel`, and share the functions at the end of this page. `native` is what the targets of csrc/ share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from compacter_kernels.problem import Problem
from compacter_kernels.weights import NormWeights, PHMWeights

Gradients = tuple[Tensor | None, ...]


class LinearKernel(Protocol):
    """A fused phm_linear for one problem. Tensors may be strided; none is changed."""

    def forward(self, x: Tensor, weights: PHMWeights, out: Tensor | None = None) -> Tensor: ...

    def backward(self, x: Tensor, grad: Tensor, weights: PHMWeights, wanted: tuple[bool, ...]) -> Gradients:
        """Gradients of x, rule, left, right, bias; None where not wanted."""


class AdapterKernel(Protocol):
    """A fused compacter_adapter for one problem. Tensors may be strided; none is changed.

    adds_both: whether forward can add x besides another residual (also_x).
    norms: whether it is a `NormingKernel` too.
    """

    adds_both: bool
    norms: bool

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        out: Tensor | None = None,
        also_x: bool = False,
    ) -> Tensor: ...

    def backward(
        self,
        x: Tensor,
        grad: Tensor,
        residual_is_x: bool,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        wanted: tuple[bool, ...],
    ) -> Gradients:
        """Gradients of x, then rule, left, right, bias of down and of up; None where not wanted."""


class NormingKernel(Protocol):
    """A fused norm(y), y = scale * up(act(down(x))) + x + residual, with a layer norm in x's dtype over its rows."""

    def forward_normed(
        self,
        x: Tensor,
        residual: Tensor,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        norm: NormWeights,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        """norm(y), and y where it is to be kept for backward, else anything."""

    def backward_normed(
        self,
        x: Tensor,
        y: Tensor,
        grad: Tensor,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        norm: NormWeights,
        wanted: tuple[bool, ...],
        spend: bool,
    ) -> Gradients:
        """The gradient of residual, in y's memory if that may be spent; then as `AdapterKernel.backward`."""


def forward_with(
    kernel: AdapterKernel,
    x: Tensor,
    residual: Tensor | None,
    residual_is_x: bool,
    scale: float,
    down: PHMWeights,
    up: PHMWeights,
) -> Tensor:
    """kernel.forward with a residual, with x as one, or with both: in one pass where the kernel can, else by torch."""
    if not residual_is_x or residual is None:
        return kernel.forward(x, x if residual_is_x else residual, scale, down, up)
    if kernel.adds_both:
        return kernel.forward(x, residual, scale, down, up, also_x=True)
    return kernel.forward(x, residual + x, scale, down, up)


def not_fused(problem: Problem) -> str | None:
    """Why no fused kernel serves this problem on any device, or None."""
    if problem.dtype == torch.float64:
        return "x is float64; the kernels compute in float32"
    if any(p.rank is None for p in problem.projections):
        return "the weights are not factorised (right is None)"
    if problem.activation is not None and problem.activation.code is None:
        return f"the activation {problem.activation.name} is not fused"
    return None


def architecture(device: torch.device) -> str:
    """The name of a device's architecture: "sm_90", "gfx942"; of any but a GPU the device's type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    name: str = getattr(properties, "gcnArchName", "")
    return name.split(":")[0] if torch.version.hip is not None else f"sm_{properties.major}{properties.minor}"


# torch.compile evaluates it and looks no further; torch.compiler.assume_constant_result does this, and imports dynamo
architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]


def contiguous(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Each tensor itself where it is contiguous, else a contiguous copy."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def empty_gradients(tensors: Sequence[Tensor | None], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """An uninitialised contiguous tensor for each gradient that is wanted."""
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
