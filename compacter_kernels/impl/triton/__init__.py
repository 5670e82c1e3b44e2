"""Fused Triton kernels for any GPU: one kernel forward; backward one and a small second stage."""

from __future__ import annotations

import importlib.util
import os

import torch

from compacter_kernels.impl import Kernel, not_fused
from compacter_kernels.impl.triton import sizes as _sizes
from compacter_kernels.problem import Problem

OPERANDS_LIKE_X = True  # the matrix operands that meet a 16-bit x are 16-bit numbers or pairs of them
MOST_ADAPTERS = 65535  # the rows of a grid


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
    if reason := not_fused(problem) or _unserved(problem):
        return reason
    return _sizes.too_large(_sizes.sizes(problem)) or _sizes.too_large(_sizes.sizes(problem, backward=True))


def _unserved(problem: Problem) -> str | None:
    """What the kernels lack for this problem, or None."""
    adapter = problem.operation == "adapter"
    if adapter and any(p.phm_dim is None for p in problem.projections):
        return "the kernels take no adapter with a rule that is not (phm_dim, phm_dim, phm_dim)"
    if problem.bank is not None and problem.bank.adapters > MOST_ADAPTERS:
        return f"the kernels take at most {MOST_ADAPTERS} adapters"
    return None


def prepare(problem: Problem) -> Kernel:
    """The kernel for this problem."""
    from compacter_kernels.impl.triton.dense_weights import DenseKernel, kernel_class

    return DenseKernel(problem) if problem.operation == "bottleneck" else kernel_class(problem)(problem)
