"""The implementations, by name. Each is a module of its own, imported on first use; none imports another.

Every impl module has `unavailable()` and `refuses(problem)`. Plain-torch impls then have `linear` and `adapter`, which
autograd differentiates by itself; fused ones have `prepare(problem)`, which returns a `Kernel`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Protocol

from torch import Tensor

from compacter_kernels.weights import PHMWeights

NAMES = ("dense", "factored", "cpu")
PLAIN = ("dense", "factored")  # plain torch: autograd and torch.compile see through them
PREFERENCE = ("cpu", "factored", "dense")  # the order in which "auto" asks

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


_modules: dict[str, ModuleType] = {}


def load(name: str) -> ModuleType:
    """The module of an impl in NAMES."""
    if name not in _modules:
        _modules[name] = importlib.import_module(f"{__name__}.{name}")
    return _modules[name]
