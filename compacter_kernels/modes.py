"""Who else takes part in a call: a tracer, a dispatch mode, a transform of torch.func, forward-mode AD.

A kernel that is launched on addresses is seen by none of them. Where each operation is recorded (torch.jit.trace,
make_fx, FakeTensor and other dispatch modes) fused impls run as operators; a transform needs an impl of plain torch.

torch has no public name for three of these questions, and every eager call asks them. The private names stand here
alone. With a torch that lacks one, a call runs as if somebody took part, which is right and slower.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad


def _private(name: str) -> Callable[[], Any]:
    return getattr(torch._C, name, None) or (lambda: True)


_dispatch_modes = _private("_len_torch_dispatch_stack")
_transforms = _private("_are_functorch_transforms_active")
_is_tracing = _private("_is_tracing")  # torch.jit.is_tracing takes twice as long
_forward_ad: Any = forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode AD, is active."""
    return bool(_transforms()) or _forward_ad._current_level >= 0


def alone() -> bool:
    """Whether none of these takes part. torch.compile is another question, which it answers itself."""
    return not (_dispatch_modes() or _transforms() or _forward_ad._current_level >= 0 or _is_tracing())


def only_torch_operators() -> bool:
    """Whether what is recorded must consist of torch's own operators: for torch.jit.trace and torch.onnx.export."""
    return bool(_is_tracing()) or torch.onnx.is_in_onnx_export()
