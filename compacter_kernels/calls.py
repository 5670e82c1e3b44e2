"""What a call computes, as one value that every implementation takes.

    LinearCall:   y = x H + b
    AdapterCall:  y = scale * up(act(down(x))) [+ x] [+ residual], and a layer norm behind it where there is one

The activation is part of the problem (`compacter_kernels.problem`), for which a kernel is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compacter_kernels.weights import NormWeights, PHMWeights

ORDINARY = (Tensor, torch.nn.Parameter)


class LinearCall(NamedTuple):
    """phm_linear. x (..., in)."""

    x: Tensor
    weights: PHMWeights

    def named(self) -> list[tuple[str, Tensor]]:
        """All tensors that are there, with their names."""
        return [("x", self.x), *self.weights.named("weights")]

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What a backward gives gradients of, in its order."""
        return (self.x, *self.weights)

    def of(self, x: Tensor, *weights: Any) -> LinearCall:
        """The same call of other tensors, in that order."""
        return LinearCall(x, PHMWeights(*weights))

    def map(self, change: Callable[[Tensor], Tensor]) -> LinearCall:
        """The same call with `change` applied to each tensor."""
        return LinearCall(change(self.x), self.weights.map(change))


class AdapterCall(NamedTuple):
    """compacter_adapter. x (..., k); residual: None or a tensor like x, which is added; add_x: whether x is added too.

    norm: the layer norm over the rows of what is then there, or None.
    """

    x: Tensor
    down: PHMWeights
    up: PHMWeights
    residual: Tensor | None
    add_x: bool
    scale: float
    norm: NormWeights | None = None

    def named(self) -> list[tuple[str, Tensor]]:
        """All tensors that are there, with their names."""
        found = [("x", self.x), *self.down.named("down"), *self.up.named("up")]
        if self.residual is not None:
            found.append(("residual", self.residual))
        if self.norm is not None:
            found += [("norm.weight", self.norm.weight), ("norm.bias", self.norm.bias)]
        return found

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What a backward gives gradients of, in its order."""
        return (self.x, *self.down, *self.up)

    def of(self, x: Tensor, *weights: Any) -> AdapterCall:
        """The same call of other tensors, in that order."""
        return self._replace(x=x, down=PHMWeights(*weights[:4]), up=PHMWeights(*weights[4:]))

    def map(self, change: Callable[[Tensor], Tensor]) -> AdapterCall:
        """The same call with `change` applied to each tensor, those of the norm apart."""
        residual = None if self.residual is None else change(self.residual)
        return self._replace(x=change(self.x), down=self.down.map(change), up=self.up.map(change), residual=residual)


Call = LinearCall | AdapterCall


def ordinary(tensor: Tensor) -> bool:
    """Whether this is a tensor of torch's own class, which has an address, and no wrapper or stand-in of one."""
    return tensor.__class__ in ORDINARY


def fake(tensor: Tensor) -> bool:
    """Whether this is a FakeTensor, a stand-in that an operator knows how to treat; its mode is what tells it."""
    return getattr(tensor, "fake_mode", None) is not None


def explain_failure(named: Iterable[tuple[str, Tensor]], error: Exception) -> None:
    """Raise RuntimeError that names the tensors of other classes, if there are any, with which torch failed."""
    odd = [f"{name} is a {type(tensor).__name__}" for name, tensor in named if not ordinary(tensor)]
    if odd:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f"torch cannot compute this: {', '.join(odd)}. Pass plain tensors, for example full_tensor() of a DTensor, "
            f"or call the module that gathers them. torch says: {said}"
        ) from error
