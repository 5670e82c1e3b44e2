"""The weights of one projection or of a bank of them, and what a sum of Kronecker products is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Slots = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]


def _changed(tensors: Iterable[Tensor | None], change: Callable[[Tensor], Tensor]) -> Any:
    """The tensors with `change` applied to each."""
    return [None if t is None else change(t) for t in tensors]


def _times(weight: Tensor, scale: Tensor) -> Tensor:
    """weight times a number, or the weight of each adapter in a bank times its own number.

    The result is float32 or wider, as the kernels read all parameters.
    """
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else scale.reshape(())
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) * scale


class PHMWeights(NamedTuple):
    """The parameters of one projection in -> out, a sum of Kronecker products.

    In a PHM projection (arXiv 2106.04647, equations 5 to 7), terms = n_in = n_out = phm_dim.

    rule:  (terms, n_in, n_out), the slow weights A_i = rule[i].
    left:  (terms, in/n_in, r), the s_i of rank r; or a whole W (terms, in/n_in, out/n_out).
    right: (terms, r, out/n_out), the t_i; None beside a whole W.
    bias:  (out,) or None.

    Each may have any float dtype, independent of the others. In a bank of E adapters each has a
    leading dimension E. A rule without it belongs to all of them.
    """

    rule: Tensor
    left: Tensor
    right: Tensor | None = None
    bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.rule.shape[-2] * self.left.shape[-2]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        last = self.left if self.right is None else self.right
        return self.rule.shape[-1] * last.shape[-1]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.left.device

    def named(self, side: str) -> list[tuple[str, Tensor]]:
        """The tensors with their names: down.rule, down.left and so on for the side "down"."""
        return [(f"{side}.{name}", t) for name, t in zip(PHMWeights._fields, self, strict=True) if t is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> PHMWeights:
        """The same weights with `change` applied to each tensor."""
        return PHMWeights(*_changed(self, change))

    def slots(self) -> Slots:
        """rule, left, right, bias."""
        return self

    def adapter(self, index: Any) -> PHMWeights:
        """The weights of one adapter of a bank, or for a tensor of indices those of a new bank."""
        rule, *rest = self
        return PHMWeights(rule if rule.ndim == 3 else rule[index], *_changed(rest, lambda t: t[index]))

    def scaled(self, scale: Tensor) -> PHMWeights:
        """Weights of `scale` times this projection; differentiable.

        scale: one number, or one for each adapter of a bank. The scaled factor and bias are float32
        or wider.
        """
        bias = None if self.bias is None else _times(self.bias, scale)
        if self.right is None:
            return PHMWeights(self.rule, _times(self.left, scale), None, bias)
        return PHMWeights(self.rule, self.left, _times(self.right, scale), bias)


class LinearWeights(NamedTuple):
    """The parameters of one dense projection y = x W + b, with any float dtypes.

    weight: (in, out), with any strides: pass `linear.weight.t()` of an nn.Linear. bias: (out,) or
    None. In a bank of E adapters each has a leading dimension E.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[-2]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[-1]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.weight.device

    def named(self, side: str) -> list[tuple[str, Tensor]]:
        """The tensors with their names: down.weight and down.bias for the side "down"."""
        return [(f"{side}.{name}", t) for name, t in zip(LinearWeights._fields, self, strict=True) if t is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> LinearWeights:
        """The same weights with `change` applied to each tensor."""
        return LinearWeights(*_changed(self, change))

    def slots(self) -> Slots:
        """The tensors where PHMWeights have rule, left, right and bias."""
        return None, self.weight, None, self.bias

    def adapter(self, index: Any) -> LinearWeights:
        """The weights of one adapter of a bank, or for a tensor of indices those of a new bank."""
        return self.map(lambda t: t[index])

    def scaled(self, scale: Tensor) -> LinearWeights:
        """Weights of `scale` times this projection; see `PHMWeights.scaled`."""
        return LinearWeights(_times(self.weight, scale), None if self.bias is None else _times(self.bias, scale))


Weights = PHMWeights | LinearWeights


def from_slots(rule: Tensor | None, left: Tensor, right: Tensor | None, bias: Tensor | None) -> Weights:
    """The weights that have these `slots`."""
    return LinearWeights(left, bias) if rule is None else PHMWeights(rule, left, right, bias)


class NormWeights(NamedTuple):
    """A layer norm over the last dimension: weight and bias (k,); eps is added to the variance.

    rows and grad_rows, both like x, pass between autograd and a kernel only. Forward saves its
    input of the norm in rows, unless that is None. Backward reads rows and writes the gradient into
    grad_rows, which may be the same memory.
    """

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    rows: Tensor | None = None
    grad_rows: Tensor | None = None


def kronecker_sum(weights: PHMWeights, dtype: torch.dtype) -> Tensor:
    """H of unchecked weights in `dtype`, as the paper writes it: all products and their sum."""
    rule, left = weights.rule.to(dtype), weights.left.to(dtype)
    w = left if weights.right is None else torch.bmm(left, weights.right.to(dtype))
    products = rule[:, :, None, :, None] * w[:, None, :, None, :]  # (terms, n_in, in/n_in, n_out, out/n_out)
    return products.sum(0).reshape(weights.in_features, weights.out_features)


def factorised_rule(left: Tensor, right: Tensor) -> Tensor:
    """The rule A_i[p,q] = l_i[p] r_i[q] of left (n, n, 1) and right (n, 1, n), float32 or wider."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) * right.to(wide)
