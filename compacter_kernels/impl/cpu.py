"""Fused C++ kernels (csrc/cpu): one pass over x forward, one pass over x and the gradient backward."""

from __future__ import annotations

from typing import Any

import torch

from compacter_kernels.impl import native, not_fused
from compacter_kernels.problem import Problem

_C = native.MODULE
_get_num_threads = torch.get_num_threads


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    return native.MISSING if _C is None else None


def refuses(problem: Problem) -> str | None:
    """Why the kernels cannot serve this problem, or None."""
    if problem.device.type != "cpu":
        return f"x is on {problem.device.type}, not on the CPU"
    return not_fused(problem)


def prepare(problem: Problem) -> Any:
    """The kernel for this problem: a `LinearKernel` or an `AdapterKernel`."""
    arguments = native.plan_arguments(problem)
    if problem.operation == "linear":
        return _Linear(problem, _C.Linear(*arguments))
    return _Adapter(problem, _C.Adapter(*arguments))


class _OnThreads:
    """A launch on as many threads as torch has."""

    plan: Any

    def launch_forward(self, call: tuple[Any, ...], params: list[int]) -> None:
        self.plan.forward(*call, _get_num_threads(), params)

    def launch_backward(self, call: tuple[Any, ...], tokens: int, params: list[int]) -> None:
        self.plan.backward(*call, _get_num_threads(), params)


class _Linear(_OnThreads, native.Linear):
    pass


class _Adapter(_OnThreads, native.Adapter):
    adds_both = True
