"""The weights of one PHM projection, and the sum of Kronecker products that they represent."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class PHMWeights(NamedTuple):
    """The parameters of one projection in -> out (arXiv 2106.04647, equations 5 to 7), n = phm_dim.

    rule:  (n, n, n), the slow weights A_i = rule[i].
    left:  (n, in/n, r), the s_i of rank r; or an unfactorised W of shape (n, in/n, out/n).
    right: (n, r, out/n), the t_i; None beside an unfactorised W.
    bias:  (out,) or None.

    Each may have any float dtype, independent of the others.
    """

    rule: Tensor
    left: Tensor
    right: Tensor | None = None
    bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.left.shape[0] * self.left.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        last = self.left if self.right is None else self.right
        return last.shape[0] * last.shape[2]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.rule.device

    def named(self, side: str) -> list[tuple[str, Tensor]]:
        """The tensors with their names: down.rule, down.left and so on for the side "down"."""
        return [(f"{side}.{name}", t) for name, t in zip(self._fields, self, strict=True) if t is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> PHMWeights:
        """The same weights with `change` applied to each tensor."""
        return PHMWeights(*(None if t is None else change(t) for t in self))  # type: ignore[arg-type]

    def scaled(self, scale: Tensor) -> PHMWeights:
        """Weights of `scale`, a tensor of one number, times this projection; differentiable.

        The scaled factor and bias are float32 or wider, as the kernels read all parameters.
        """

        def times(weight: Tensor) -> Tensor:
            return weight.to(torch.promote_types(weight.dtype, torch.float32)) * scale

        bias = None if self.bias is None else times(self.bias)
        if self.right is None:
            return PHMWeights(self.rule, times(self.left), None, bias)
        return PHMWeights(self.rule, self.left, times(self.right), bias)


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
    """H of unchecked weights in `dtype`, as the paper writes it: n products and their sum."""
    rule, left = weights.rule.to(dtype), weights.left.to(dtype)
    w = left if weights.right is None else torch.bmm(left, weights.right.to(dtype))
    products = rule[:, :, None, :, None] * w[:, None, :, None, :]  # (n, n, in/n, n, out/n)
    return products.sum(0).reshape(weights.in_features, weights.out_features)


def factorised_rule(left: Tensor, right: Tensor) -> Tensor:
    """The rule A_i[p,q] = l_i[p] r_i[q] of left (n, n, 1) and right (n, 1, n), float32 or wider."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) * right.to(wide)
