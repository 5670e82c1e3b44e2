"""Modules that may use parameters of other modules instead of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels.nn.partitioned import full_shape
from compacter_kernels.private import parameter


class Borrower(nn.Module):
    """A module that reads each of its parameters, in every call, where `borrow` says."""

    # None for no parameters; torch.compile of torch 2.6 cannot read an empty mapping from a class
    _borrowed: Mapping[str, tuple[nn.Module, str]] | None = None

    def borrow(self, owner: nn.Module, **names: str) -> None:
        """Use the parameters of another module instead of this one's own, which are deleted.

        This module then does not hold, move or save them. It reads them from the owner in every
        call, and so follows a sharded model, for example, that replaces them.

        names: the owner's name of each parameter, as in phm_rule="phm_rule", W_left="W_down_left".
        """
        for name, owner_name in names.items():
            shape = full_shape(getattr(self, name))
            if full_shape(getattr(owner, owner_name)) != shape:
                raise ValueError(f"{name} has shape {tuple(shape)}, the owner's {owner_name} another")
        for name in names:
            delattr(self, name)
        self._borrowed = {**(self._borrowed or {}), **{name: (owner, its) for name, its in names.items()}}

    def _weight(self, name: str) -> Any:
        """A parameter of this module or a borrowed one; None if the options leave it out."""
        if self._borrowed is None or name not in self._borrowed:
            return parameter(self, name)
        owner, owner_name = self._borrowed[name]
        return getattr(owner, owner_name)


class LayerNorm(Borrower, nn.LayerNorm):
    """nn.LayerNorm, also for an input of another dtype than its parameters.

    It then computes in the dtype of the parameters and returns that of the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., normalized_shape) to the same shape and dtype."""
        weight, bias = self._weight("weight"), self._weight("bias")
        y = x if weight is None or x.dtype == weight.dtype else x.to(weight.dtype)
        return F.layer_norm(y, self.normalized_shape, weight, bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """The shape and eps."""
        return f"{self.normalized_shape}, eps={self.eps}"
