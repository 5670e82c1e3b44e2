"""What adapters of every kind have around their projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels.activations import resolve
from compacter_kernels.dispatch import check_name
from compacter_kernels.nn.borrower import Borrower, LayerNorm
from compacter_kernels.private import children, runs


class SharesRule(nn.Module):
    """A module whose children down and up may share parameters."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep what down and up share when `to`, `double`, `to_empty` and so on call this.

        torch replaces a Parameter on meta by a new one for each of its names. It has no public hook
        for this.
        """
        down, up = (self._modules[position]._parameters for position in ("down", "up"))  # type: ignore[union-attr]
        shared = [name for name, rule in down.items() if rule is not None and up.get(name) is rule]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse:
            up.update({name: down[name] for name in shared})
        return self


class AdapterBase(Borrower):
    """scale * up(act(down(x))) + x, with a learned scale, layer norms and dropout as options.

    A subclass makes the modules `down` and `up`, whose `weights()` its function takes.
    """

    _projection: type[nn.Module]  # the class of down and up
    _function: Callable[..., Tensor]  # computes both together
    scaling: nn.Parameter | None

    def _set_options(
        self,
        hidden_size: int,
        bottleneck: int,
        reduction_factor: float,
        activation: str | Callable[[Tensor], Tensor],
        add_residual: bool,
        scale: float | str,
        dropout: float,
        residual_before_ln: bool,
        impl: str,
    ) -> None:
        """Check and keep the options that adapters of every kind have."""
        resolve(activation)
        if scale != "learned" and not (isinstance(scale, (float, int)) and math.isfinite(scale)):
            raise ValueError(f"scale must be a finite number or 'learned', got {scale!r}")
        if not (isinstance(dropout, (float, int)) and 0.0 <= dropout < 1.0):
            raise ValueError(f"dropout must be a probability in [0, 1), got {dropout!r}")
        check_name(impl)
        self.hidden_size, self.bottleneck, self.reduction_factor = hidden_size, bottleneck, reduction_factor
        self.activation, self.add_residual, self.scale, self.dropout = activation, add_residual, scale, dropout
        self.residual_before_ln, self.impl = residual_before_ln, impl

    def _add_scaling_and_norms(self, ln_before: bool, ln_after: bool, device: Any, dtype: Any) -> None:
        self.ln_before, self.ln_after = ln_before, ln_after
        scaling = nn.Parameter(torch.ones(1, device=device, dtype=dtype)) if self.scale == "learned" else None
        self.register_parameter("scaling", scaling)
        self.norm_before = LayerNorm(self.hidden_size, device=device, dtype=dtype) if ln_before else None
        self.norm_after = LayerNorm(self.hidden_size, device=device, dtype=dtype) if ln_after else None

    def _reset_scaling_and_norms(self) -> None:
        if self.scaling is not None:
            nn.init.ones_(self.scaling)
        for norm in (self.norm_before, self.norm_after):
            if norm is not None:
                norm.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map x (..., hidden_size) to the same shape, in the promoted dtype of x and residual.

        residual: a tensor to add instead of x, for a parallel adapter or a residual before a norm.
        """
        if residual is None and self.add_residual:
            residual = x
        h = x if self.norm_before is None else self.norm_before(x)
        late = self.dropout > 0 and self.training
        late |= self.norm_after is not None and not self.residual_before_ln
        late |= isinstance(residual, Tensor) and residual.dtype != h.dtype
        modules = children(self)
        down, up = modules["down"], modules["up"]
        scaling = self._weight("scaling")
        scale = self.scale if scaling is None else scaling
        if runs(self._projection.forward, down, up):
            y = self._function(
                h,
                down.weights(),
                up.weights(),
                activation=self.activation,
                residual=None if late else residual,
                scale=scale,
                impl=self.impl,
            )
        else:
            late = True
            y = up(resolve(self.activation).function(down(h)))
            y = (y * scale).to(h.dtype)
        if not late:
            return y if self.norm_after is None else self.norm_after(y)
        return self._finished(F.dropout(y, self.dropout, self.training), residual)

    def _finished(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """The output y of the projections, scaled and dropped, with the residual and the norm."""
        if self.norm_after is not None and not self.residual_before_ln:
            y = self.norm_after(y)
        if residual is not None:
            y = y + residual
        return self.norm_after(y) if self.norm_after is not None and self.residual_before_ln else y

    def _as_built(self) -> bool:
        """Whether both projections are still of their class, which arguments can describe."""
        return isinstance(self.down, self._projection) and isinstance(self.up, self._projection)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})" if self._as_built() else super().__repr__()
