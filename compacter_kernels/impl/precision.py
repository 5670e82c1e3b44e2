"""The precision of the plain-torch impls: float32, as in the kernels, and one final rounding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for a float64 x, else float32, so that H never has low precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled for the type of this device."""
    kind = device.type
    return bool(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast for this type of device: matmuls keep their own dtype."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
