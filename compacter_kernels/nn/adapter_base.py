"""What adapters of every kind have around their projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.nn.borrower import Borrower, LayerNorm


class AdapterBase(Borrower):
    """A learned scale, layer norms of the input and of the output, and a residual."""

    scaling: nn.Parameter | None
    residual_before_ln: bool

    def _add_scaling_and_norms(
        self, hidden_size: int, scale: float | str, ln_before: bool, ln_after: bool, device: Any, dtype: Any
    ) -> None:
        scaling = nn.Parameter(torch.ones(1, device=device, dtype=dtype)) if scale == "learned" else None
        self.register_parameter("scaling", scaling)
        self.norm_before = LayerNorm(hidden_size, device=device, dtype=dtype) if ln_before else None
        self.norm_after = LayerNorm(hidden_size, device=device, dtype=dtype) if ln_after else None

    def _reset_scaling_and_norms(self) -> None:
        if self.scaling is not None:
            nn.init.ones_(self.scaling)
        for norm in (self.norm_before, self.norm_after):
            if norm is not None:
                norm.reset_parameters()

    def _finished(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """The output y of the projections, scaled and dropped, with the residual and the norm."""
        if self.norm_after is not None and not self.residual_before_ln:
            y = self.norm_after(y)
        if residual is not None:
            y = y + residual
        return self.norm_after(y) if self.norm_after is not None and self.residual_before_ln else y
