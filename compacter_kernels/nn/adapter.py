"""CompacterAdapter, a bottleneck adapter of two PHM projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.functional import compacter_adapter
from compacter_kernels.nn.adapter_base import AdapterBase, SharesRule
from compacter_kernels.nn.initialisation import reset_rule
from compacter_kernels.nn.phm_linear import PHMLinear, Rule, arguments, rule_shapes
from compacter_kernels.problem import check_phm_dim


class CompacterAdapter(SharesRule, AdapterBase):
    """scale * up(act(down(x))) + x, the adapter of Compacter (arXiv 2106.04647, section 3).

    The bottleneck between down and up has hidden_size // reduction_factor numbers. The parameters
    are those of `PHMLinear` under `down.` and `up.`, and `scaling`, `norm_before.*` and
    `norm_after.*` if the options ask for them.

    One kernel computes down and up together. If one of them has hooks, as pruning adds, or is
    replaced by another module, both are called as modules, one after the other.

    Args:
        hidden_size: the width of x; phm_dim must divide it and the bottleneck.
        reduction_factor: an int or a float.
        activation: a name or a callable, see `compacter_kernels.compacter_adapter`.
        phm_rule: a Parameter to share with other adapters; a pair for a factorised rule.
        shared_phm_rule: without phm_rule, whether down and up share one rule, as in Compacter.
        add_residual: add x, or the `residual` passed to forward.
        scale: a number, or "learned" for a parameter `scaling` that starts at 1.
        dropout: the probability of dropout on the scaled output, before the residual.
        ln_before, ln_after: whether there is a layer norm of the input, and of the output.
        residual_before_ln: whether the residual is added before the layer norm of the output.
        phm_init_range: the spread of the rule that down and up share.
        phm_bias: whether the projections have a bias.
        phm_rank, factorized_phm_W, factorized_phm_rule, learn_phm: see `PHMLinear`.
        init, phm_c_init, impl: see `PHMLinear`.

    Raises:
        TypeError, ValueError: an option does not fit; the message names it and a value that does.
    """

    _projection, _function = PHMLinear, staticmethod(compacter_adapter)

    def __init__(
        self,
        hidden_size: int,
        *,
        reduction_factor: float = 32,
        phm_dim: int = 4,
        phm_rank: int = 1,
        activation: str | Callable[[Tensor], Tensor] = "gelu_new",
        phm_rule: Rule | None = None,
        add_residual: bool = True,
        scale: float | str = 1.0,
        dropout: float = 0.0,
        ln_before: bool = False,
        ln_after: bool = False,
        residual_before_ln: bool = True,
        phm_bias: bool = True,
        factorized_phm_W: bool = True,
        factorized_phm_rule: bool = False,
        shared_phm_rule: bool = True,
        learn_phm: bool = True,
        init: str = "paper",
        phm_init_range: float = 1e-4,
        phm_c_init: str = "normal",
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        bottleneck = bottleneck_of(hidden_size, reduction_factor)
        check_phm_dim(phm_dim, phm_rank, hidden_size=hidden_size, bottleneck=bottleneck)
        sizes = (hidden_size, bottleneck, reduction_factor)
        self._set_options(*sizes, activation, add_residual, scale, dropout, residual_before_ln, impl)
        self.shared_phm_rule = shared_phm_rule
        self._own_rule = phm_rule is None and shared_phm_rule
        if self._own_rule:
            shapes = rule_shapes(phm_dim, factorized_phm_rule)
            phm_rule = tuple(nn.Parameter(torch.empty(s, device=device, dtype=dtype), learn_phm) for s in shapes)
        options: dict[str, Any] = {
            "phm_dim": phm_dim,
            "phm_rank": phm_rank,
            "phm_rule": phm_rule,
            "bias": phm_bias,
            "factorized_phm_W": factorized_phm_W,
            "factorized_phm_rule": factorized_phm_rule,
            "learn_phm": learn_phm,
            "init": init,
            "phm_init_range": phm_init_range,
            "phm_c_init": phm_c_init,
            "impl": impl,
            "device": device,
            "dtype": dtype,
        }
        self.down = PHMLinear(hidden_size, bottleneck, **options)
        self.up = PHMLinear(bottleneck, hidden_size, **options)
        self._add_scaling_and_norms(ln_before, ln_after, device, dtype)
        self._reset_shared_rule()

    def _reset_shared_rule(self) -> None:
        if self._own_rule:
            reset_rule(self.down.rule_parameters(), self.down.phm_init_range, self.down.phm_c_init)

    def reset_parameters(self) -> None:
        """Draw new values for all weights, except a rule that was passed in."""
        self.down.reset_parameters()
        self.up.reset_parameters()
        self._reset_shared_rule()
        self._reset_scaling_and_norms()

    def extra_repr(self) -> str:
        """The arguments that rebuild this adapter. A rule passed in appears as phm_rule."""
        if not self._as_built():
            return f"{self.hidden_size}"
        values = {**vars(self.down), **vars(self), "phm_bias": self.down.bias is not None}
        shared_rule = self.down.shared_phm_rule and not self._own_rule
        return arguments(self, "hidden_size", shared_rule=shared_rule, values=values)


def bottleneck_of(hidden_size: int, reduction_factor: float) -> int:
    """The bottleneck, hidden_size // reduction_factor; ValueError if there is none."""
    if not isinstance(hidden_size, int) or hidden_size < 1:
        raise ValueError(f"hidden_size must be an integer >= 1, got {hidden_size!r}")
    if isinstance(reduction_factor, bool) or not isinstance(reduction_factor, int | float) or not reduction_factor > 0:
        raise ValueError(f"reduction_factor must be a number > 0, got {reduction_factor!r}")
    bottleneck = int(hidden_size // reduction_factor)
    if bottleneck < 1:
        raise ValueError(f"reduction_factor={reduction_factor} leaves no bottleneck of hidden_size={hidden_size}")
    return bottleneck


def reduction_factor_of(hidden_size: int, bottleneck: int) -> float:
    """A factor with hidden_size // factor == bottleneck, an int if possible."""
    if bottleneck and hidden_size % bottleneck == 0:
        return hidden_size // bottleneck
    factor = hidden_size / max(bottleneck, 1)
    while hidden_size // factor < bottleneck:  # rounded up
        factor = math.nextafter(factor, 0.0)
    return factor
