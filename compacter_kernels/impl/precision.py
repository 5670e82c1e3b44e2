"""How the plain-torch impls keep the kernels' precision: float32 inside, one rounding at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for a float64 x, else float32: H is never formed in low precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function(x, ...)` with autocast off on x's device, so that its matmuls keep the precision it chose.

    x may be anything with a device.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = args[0].device.type  # type: ignore[attr-defined]
        if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return wrapper
