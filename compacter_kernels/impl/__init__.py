"""The implementations. Each is a module of its own, light to import; none imports another.

Every impl module has `unavailable()` and `refuses(problem)`; with `unmeasured(problem)` one says what "auto" leaves to
others. Plain-torch impls then have `linear` and `adapter`, which autograd differentiates by itself; fused ones have
`prepare(problem)`, which returns a `Kernel`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from compacter_kernels.weights import PHMWeights

Gradients = tuple[Tensor | None, ...]


class LinearKernel(Protocol):
    """A fused phm_linear for one problem. Tensors may be strided; none is changed."""

    def forward(self, x: Tensor, weights: PHMWeights, out: Tensor | None = None) -> Tensor: ...

    def backward(self, x: Tensor, grad: Tensor, weights: PHMWeights, wanted: tuple[bool, ...]) -> Gradients:
        """Gradients of x, rule, left, right, bias; None where not wanted."""


class AdapterKernel(Protocol):
    """A fused compacter_adapter for one problem. Tensors may be strided; none is changed."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        out: Tensor | None = None,
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
