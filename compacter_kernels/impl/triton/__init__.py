"""Fused Triton kernels for any GPU: one kernel forward; one kernel and a small second stage backward."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from compacter_kernels.impl import not_fused
from compacter_kernels.impl.triton import sizes as _sizes
from compacter_kernels.problem import Problem

OPERANDS_LIKE_X = True  # matrix operands beside a 16-bit x are 16-bit numbers, or pairs of them


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device"


def refuses(problem: Problem) -> str | None:
    """Why the kernels cannot serve this problem, or None."""
    wanted = "cpu" if _interpreted() else "cuda"
    if problem.device.type != wanted:
        return f"x is on {problem.device.type}, not on {wanted}"
    if reason := not_fused(problem):
        return reason
    return _sizes.too_large(_sizes.sizes(problem)) or _sizes.too_large(_sizes.sizes(problem, backward=True))


def unmeasured(problem: Problem) -> str | None:
    """Why "auto" leaves this problem to another impl though the kernels could serve it, or None."""
    if problem.device.type != "cuda" or problem.dtype != torch.bfloat16:
        return f"not measured yet on {problem.device.type} in {str(problem.dtype).removeprefix('torch.')}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(problem.device) != (9, 0):
        return "measured on sm_90 alone so far"
    return None


def prepare(problem: Problem) -> Any:
    """The kernel for this problem: a `LinearKernel` or an `AdapterKernel`."""
    from compacter_kernels.impl.triton.kernel import Adapter, Linear

    return Linear(problem) if problem.operation == "linear" else Adapter(problem)
