"""How the plain-torch impls keep the kernels' precision: float32 inside, one rounding at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for a float64 x, else float32: H is never formed in low precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for such a device."""
    kind = device.type
    return bool(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast is off on such a device within, so that matmuls keep the precision that was chosen for them."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
