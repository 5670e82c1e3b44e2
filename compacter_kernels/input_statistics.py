"""The covariance of the inputs of a layer, by which `from_dense` fits its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 8192  # at a time, so that their copy in float64 stays small


class InputStatistics:
    """C = sum_i forget^(N - i) x_i^T x_i over the N rows x_i that were seen, the last one N.

    Each row x makes C into forget * C + x^T x, the recursion of recursive least squares. So it does
    not matter how the rows come in batches.

        stats = ck.InputStatistics()
        with stats.recording(layer):
            model(batch)
        ck.PHMLinear.from_dense(layer, inputs=stats)

    C is a sum of float64, on the device of the first rows. Inputs of trained layers are nearly
    dependent: in float32, rounding would hide the directions that hold less than 1e-7 of the
    largest, and a long sum would lose its small terms.

    Args:
        forget: from above 0 to 1. With less than 1, rows before the last 1 / (1 - forget) count
            little.

    Raises:
        ValueError: forget is outside (0, 1].
    """

    def __init__(self, forget: float = 1.0) -> None:
        if not isinstance(forget, (float, int)) or isinstance(forget, bool) or not 0 < forget <= 1:
            raise ValueError(f"forget must be a number above 0 and at most 1, got {forget!r}")
        self.forget = float(forget)
        self.rows = 0
        self.covariance: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the rows of x (..., width), of any float dtype; the last one counts most.

        Padding counts as well: pass x[mask] if there is any.

        Raises:
            TypeError: x is no float tensor.
            ValueError: x has another width or device than before, or holds NaN or infinite values.
                Nothing is added then.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a float tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        if x.ndim == 0 or x.shape[-1] == 0:
            raise ValueError(f"x must have shape (..., width), got {tuple(x.shape)}")
        covariance = self.covariance
        if covariance is not None and (x.shape[-1], x.device) != (len(covariance), covariance.device):
            before = f"{len(covariance)} on {covariance.device}"
            raise ValueError(f"x has the width {x.shape[-1]} on {x.device}, the rows before had {before}")
        if covariance is None:
            covariance = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
        rows = x.reshape(-1, x.shape[-1])
        for part in rows.split(ROWS):
            ages = torch.arange(len(part) - 1, -1, -1, dtype=torch.float64, device=x.device)
            weighed = part.double() * self.forget ** (ages[:, None] / 2)
            covariance = self.forget ** len(part) * covariance + weighed.T @ weighed
        if not covariance.isfinite().all():
            raise ValueError("x holds NaN or infinite values, or values whose squares are too large")
        self.covariance, self.rows = covariance, self.rows + len(rows)

    def merge(self, later: InputStatistics) -> None:
        """Add the rows of other statistics, as if they had come after those seen here.

        Raises:
            TypeError, ValueError: they are no InputStatistics, of another width or `forget`.
        """
        if not isinstance(later, InputStatistics):
            raise TypeError(f"later must be InputStatistics, got {type(later).__name__}")
        if later.forget != self.forget:
            raise ValueError(f"forget is {later.forget} there and {self.forget} here")
        if later.covariance is None:
            return
        covariance = later.covariance.clone()
        if self.covariance is not None:
            if len(self.covariance) != len(covariance):
                raise ValueError(f"the width is {len(covariance)} there and {len(self.covariance)} here")
            covariance = self.forget**later.rows * self.covariance + covariance.to(self.covariance.device)
        self.covariance, self.rows = covariance, self.rows + later.rows

    @contextmanager
    def recording(self, module: nn.Module) -> Iterator[InputStatistics]:
        """Add the first input of every call of the module, such as an nn.Linear, while inside."""
        hook = module.register_forward_pre_hook(
            lambda _, args, kwargs: self.update(next(iter((*args, *kwargs.values())))), with_kwargs=True
        )
        try:
            yield self
        finally:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """`forget`, `rows` and `covariance`, for torch.save."""
        return {"forget": self.forget, "rows": self.rows, "covariance": self.covariance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave in place of what was seen here."""
        self.forget, self.rows, self.covariance = state["forget"], state["rows"], state["covariance"]

    def of_width(self, width: int, name: str) -> Tensor:
        """C (width, width), float64, on the CPU.

        Raises:
            ValueError: no rows were seen, or rows of another width; the message has the `name`.
        """
        if self.covariance is None or not self.rows:
            raise ValueError(f"{name}: no rows were seen; call update, or run the model inside recording")
        if len(self.covariance) != width:
            raise ValueError(f"{name}: the rows have {len(self.covariance)} columns, the projection takes {width}")
        return self.covariance.to("cpu", torch.float64)

    def __repr__(self) -> str:
        width = None if self.covariance is None else len(self.covariance)
        return f"InputStatistics(forget={self.forget}, rows={self.rows}, width={width})"
