"""The arguments of one call, as the value that every implementation takes.

    LinearCall:   y = x H + b
    AdapterCall:  y = norm(scale * up(act(down(x))) [+ x] [+ residual]), where norm may be absent

The activation belongs to the problem (`compacter_kernels.problem`), which a kernel is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from compacter_kernels.weights import NormWeights, PHMWeights

ORDINARY = (Tensor, torch.nn.Parameter)


class LinearCall(NamedTuple):
    """A call of phm_linear with x (..., in)."""

    x: Tensor
    weights: PHMWeights

    def named(self) -> list[tuple[str, Tensor]]:
        """All tensors of the call, with their names."""
        return [("x", self.x), *self.weights.named("weights")]

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that get a gradient, in the order of `Kernel.backward`."""
        return (self.x, *self.weights)

    def map(self, change: Callable[[Tensor], Tensor]) -> LinearCall:
        """The same call with `change` applied to each tensor."""
        return LinearCall(change(self.x), self.weights.map(change))


class AdapterCall(NamedTuple):
    """A call of compacter_adapter with x (..., k).

    residual, a tensor like x or None, is added, and with add_x also x. norm, or None, is the layer
    norm over the rows of that sum.
    """

    x: Tensor
    down: PHMWeights
    up: PHMWeights
    residual: Tensor | None
    add_x: bool
    scale: float
    norm: NormWeights | None = None

    def named(self) -> list[tuple[str, Tensor]]:
        """All tensors of the call, with their names."""
        named = [("x", self.x), *self.down.named("down"), *self.up.named("up")]
        if self.residual is not None:
            named.append(("residual", self.residual))
        if self.norm is not None:
            named += [("norm.weight", self.norm.weight), ("norm.bias", self.norm.bias)]
        return named

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that get a gradient, in the order of `Kernel.backward`."""
        return (self.x, *self.down, *self.up)

    def map(self, change: Callable[[Tensor], Tensor]) -> AdapterCall:
        """The same call with `change` applied to each tensor, except those of the norm."""
        residual = None if self.residual is None else change(self.residual)
        return self._replace(x=change(self.x), down=self.down.map(change), up=self.up.map(change), residual=residual)


Call = LinearCall | AdapterCall


def ordinary(tensor: Tensor) -> bool:
    """Whether the tensor is of torch's own class, and so has an address, unlike a wrapper class."""
    return tensor.__class__ in ORDINARY


def fake(tensor: Tensor) -> bool:
    """Whether the tensor is a FakeTensor, which operators can treat, as its fake_mode shows."""
    return getattr(tensor, "fake_mode", None) is not None


def explain_failure(named: Iterable[tuple[str, Tensor]], error: Exception) -> None:
    """Raise RuntimeError from an error of torch if tensors are not ordinary; it names them."""
    foreign = [f"{name} is a {type(tensor).__name__}" for name, tensor in named if not ordinary(tensor)]
    if foreign:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f"torch cannot compute this: {', '.join(foreign)}. Pass plain tensors, for example full_tensor() of a "
            f"DTensor, or call the module that gathers them. torch says: {reason}"
        ) from error
