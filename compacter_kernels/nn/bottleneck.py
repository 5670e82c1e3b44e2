"""BottleneckAdapter, an adapter of two dense projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels.functional import bottleneck_adapter
from compacter_kernels.nn.adapter import bottleneck_of
from compacter_kernels.nn.adapter_base import AdapterBase
from compacter_kernels.nn.borrower import Borrower
from compacter_kernels.nn.phm_linear import arguments
from compacter_kernels.weights import LinearWeights

INITIAL_WEIGHTS = ("bert", "mam_adapter", "houlsby")


class Linear(Borrower, nn.Linear):
    """nn.Linear whose weight and bias may be borrowed.

    It computes in the dtype of its weight, or in that of autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        weight = self._weight("weight")
        return F.linear(x if x.dtype == weight.dtype else x.to(weight.dtype), weight, self._weight("bias"))

    def factor_names(self) -> tuple[str, ...]:
        """The names of the parameters but the bias."""
        return ("weight",)

    def weights(self) -> LinearWeights:
        """The parameters for the functions."""
        return self.packed(self._weight)

    def packed(self, read: Callable[[str], Any]) -> LinearWeights:
        """The parameters that `read` gives by their names, as `weights` packs its own."""
        return LinearWeights(read("weight").mT, read("bias"))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class BottleneckAdapter(AdapterBase):
    """scale * up(act(down(x))) + x, the adapter of Houlsby et al. (arXiv 1902.00751).

    The bottleneck between down and up has hidden_size // reduction_factor numbers. The parameters
    are down.weight, down.bias, up.weight, up.bias, and `scaling`, `norm_before.*` and
    `norm_after.*` if the options ask for them.

    One kernel computes down and up together. If one of them has hooks, as pruning adds, or is
    replaced by another module, both are called as modules, one after the other.

    Args:
        hidden_size: the width of x.
        reduction_factor: an int or a float.
        activation: a name or a callable, see `compacter_kernels.bottleneck_adapter`.
        add_residual: add x, or the `residual` passed to forward.
        scale: a number, or "learned" for a parameter `scaling` that starts at 1.
        dropout: the probability of dropout on the scaled output, before the residual.
        ln_before, ln_after: whether there is a layer norm of the input, and of the output.
        residual_before_ln: whether the residual is added before the layer norm of the output.
        init_weights: how weights are drawn, as `adapters` does. Biases are 0. "bert": normal with
            deviation 0.02. "houlsby": normal with deviation 0.01, within two of them.
            "mam_adapter": down as nn.Linear, up 0.
        impl: see `compacter_kernels.bottleneck_adapter`.

    Raises:
        TypeError, ValueError: an option does not fit; the message names it.
    """

    _projection, _function = Linear, staticmethod(bottleneck_adapter)

    def __init__(
        self,
        hidden_size: int,
        *,
        reduction_factor: float = 16,
        activation: str | Callable[[Tensor], Tensor] = "swish",
        add_residual: bool = True,
        scale: float | str = 1.0,
        dropout: float = 0.0,
        ln_before: bool = False,
        ln_after: bool = False,
        residual_before_ln: bool = True,
        init_weights: str = "bert",
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        bottleneck = bottleneck_of(hidden_size, reduction_factor)
        sizes = (hidden_size, bottleneck, reduction_factor)
        self._set_options(*sizes, activation, add_residual, scale, dropout, residual_before_ln, impl)
        if init_weights not in INITIAL_WEIGHTS:
            raise ValueError(f"init_weights={init_weights!r} is not known; choose one of {', '.join(INITIAL_WEIGHTS)}")
        self.init_weights = init_weights
        self.down = Linear(hidden_size, bottleneck, device=device, dtype=dtype)
        self.up = Linear(bottleneck, hidden_size, device=device, dtype=dtype)
        self._add_scaling_and_norms(ln_before, ln_after, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new values for all weights."""
        for linear in (self.down, self.up):
            nn.init.zeros_(linear.bias)
            if self.init_weights == "bert":
                nn.init.normal_(linear.weight, std=0.02)
            elif self.init_weights == "houlsby":
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            elif linear is self.down:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            else:
                nn.init.zeros_(linear.weight)
        self._reset_scaling_and_norms()

    def extra_repr(self) -> str:
        """The arguments that rebuild this adapter."""
        if not self._as_built():
            return f"{self.hidden_size}"
        return arguments(self, "hidden_size", shared_rule=False, values={})
