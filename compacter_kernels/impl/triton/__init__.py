"""Fused Triton kernels for any GPU: one kernel forward; backward one and a small second stage."""

from __future__ import annotations

import importlib.util
import os

import torch

from compacter_kernels.impl import Kernel, not_fused
from compacter_kernels.impl.triton import sizes as _sizes
from compacter_kernels.private import evaluated_when_compiled
from compacter_kernels.problem import Problem

OPERANDS_LIKE_X = True  # the matrix operands that meet a 16-bit x are 16-bit numbers or pairs of them
OLDEST = 3, 6
MOST_ADAPTERS = 65535  # the rows of a grid


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if reason := _too_old():
        return reason
    if _interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device"


@evaluated_when_compiled
def _too_old() -> str | None:
    """Why the installed Triton cannot compile the kernels, or None. torch 2.6 brings Triton 3.2."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("triton")
    except PackageNotFoundError:  # a build of another name
        return None
    oldest = ".".join(map(str, OLDEST))
    old = tuple(int(part) for part in found.split(".")[:2]) < OLDEST
    return f"triton {found} is installed; {oldest} or later is needed" if old else None


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
