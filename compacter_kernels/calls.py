"""The arguments of one call, as the value that every implementation takes.

    LinearCall:   y = [base +] scale * (x H + b)
    AdapterCall:  y = norm(scale * up(act(down(x))) [+ x] [+ residual]), where norm may be absent
    BankCall:     the same with the adapter of each row, or with a weighted sum of all adapters

The activation belongs to the problem (`compacter_kernels.problem`), which a kernel is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from compacter_kernels.weights import NormWeights, PHMWeights, Weights

ORDINARY = (Tensor, torch.nn.Parameter)


class LinearCall(NamedTuple):
    """A call of phm_linear or kronecker_linear with x (..., in); base (..., out) or None."""

    x: Tensor
    weights: PHMWeights
    base: Tensor | None = None
    scale: float = 1.0

    def named(self) -> list[tuple[str, Tensor]]:
        """All tensors of the call, with their names."""
        named = [("x", self.x), *self.weights.named("weights")]
        return named if self.base is None else [*named, ("base", self.base)]

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that get a gradient, in the order of `Kernel.backward`."""
        return (self.x, *self.weights)

    def map(self, change: Callable[[Tensor], Tensor]) -> LinearCall:
        """The same call with `change` applied to each tensor."""
        base = None if self.base is None else change(self.base)
        return LinearCall(change(self.x), self.weights.map(change), base, self.scale)


class AdapterCall(NamedTuple):
    """A call of compacter_adapter or bottleneck_adapter with x (..., k).

    residual, a tensor like x or None, is added, and with add_x also x. norm, or None, is the layer
    norm over the rows of that sum. down and up are of one class.
    """

    x: Tensor
    down: Weights
    up: Weights
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


class BankCall(NamedTuple):
    """A call of compacter_adapter_bank with x (..., k) and the weights of E adapters.

    The rows of x are groups of equally many consecutive rows. Either route (groups,), int64, has
    the adapter of each group, -1 for none, or mix (groups, E), of any float dtype, has its weights.
    The other is None.
    """

    x: Tensor
    down: Weights
    up: Weights
    residual: Tensor | None
    add_x: bool
    scale: float
    norm: NormWeights | None
    route: Tensor | None
    mix: Tensor | None

    def named(self) -> list[tuple[str, Tensor]]:
        """All tensors of the call, with their names."""
        chosen = [("route", self.route)] if self.mix is None else [("mix", self.mix)]
        return self._adapter().named() + chosen  # type: ignore[operator]

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that get a gradient, in the order of `Kernel.backward`."""
        return (self.x, *self.down, *self.up, self.mix)

    def map(self, change: Callable[[Tensor], Tensor]) -> BankCall:
        """The same call with `change` applied to each float tensor, except those of the norm."""
        mix = None if self.mix is None else change(self.mix)
        return self._replace(**self._adapter().map(change)._asdict(), mix=mix)

    def _adapter(self) -> AdapterCall:
        """The same without route and mix."""
        *arguments, _, _ = self  # torch.compile of torch 2.6 cannot take a slice of it
        return AdapterCall(*arguments)  # type: ignore[arg-type]


Call = LinearCall | AdapterCall | BankCall


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
