"""What takes part in a call besides eager torch: a tracer, a mode, a transform, forward-mode AD.

A kernel that is launched on addresses is seen by none of them. Under a tracer or a dispatch mode
(torch.jit.trace, make_fx, FakeTensor) each operation must be recorded, so a fused impl runs as its
operator. Under a transform an impl of plain torch is needed. Every eager call asks these questions.
"""

from __future__ import annotations

import sys

from torch.jit import is_tracing  # type: ignore[attr-defined]

from compacter_kernels.private import FORWARD_AD, dispatch_modes, transforms


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode AD, is active."""
    return bool(transforms()) or FORWARD_AD._current_level >= 0


def alone() -> bool:
    """Whether none of these takes part. `torch.compiler.is_compiling` answers for torch.compile."""
    return not (dispatch_modes() or transforms() or FORWARD_AD._current_level >= 0 or is_tracing())


def only_torch_operators() -> bool:
    """Whether torch.jit.trace or torch.onnx.export records, which take torch's operators alone.

    torch imports `torch.onnx` when it is first used. No export records before, and the import would
    be most of the time of a first call.
    """
    onnx = sys.modules.get("torch.onnx")
    return bool(is_tracing()) or (onnx is not None and onnx.is_in_onnx_export())
