"""Fused C++ kernels (csrc/cpu). Forward reads x once; backward reads x and the gradient once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compacter_kernels.impl import Kernel, native, not_fused
from compacter_kernels.impl.memory import addresses, readable
from compacter_kernels.impl.module import MISSING, MODULE as _C
from compacter_kernels.impl.native_family import FamilyKernel
from compacter_kernels.problem import Problem
from compacter_kernels.weights import NormWeights

_get_num_threads = torch.get_num_threads


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    return MISSING if _C is None else None


def refuses(problem: Problem) -> str | None:
    """Why the kernels cannot serve this problem, or None."""
    if problem.device.type != "cpu":
        return f"x is on {problem.device.type}, not on the CPU"
    return not_fused(problem)


def prepare(problem: Problem) -> Kernel:
    """The kernel for this problem."""
    bank = problem.bank
    if bank is None and problem.operation != "bottleneck":
        plan = _C.Linear if problem.operation == "linear" else _C.Adapter
        return _Kernel(problem, plan(*native.plan_arguments(problem)))

    def make(transposed: tuple[bool, ...]) -> _Kernel:
        arguments = native.plan_arguments(problem, transposed)
        if bank is None:
            return _Kernel(problem, _C.Adapter(*arguments))
        return _Kernel(problem, _C.Bank(*arguments, bank.adapters, *bank.shared_rules))

    return FamilyKernel(problem, make)


class _Kernel(native.Kernel):
    """A kernel that runs on as many threads as torch uses."""

    adds_both = norms = True

    def launch_forward(self, call: tuple[Any, ...], params: tuple[int, ...]) -> None:
        self.plan.forward(*call, _get_num_threads(), params)

    def launch_backward(self, call: tuple[Any, ...], tokens: int, params: tuple[int, ...]) -> None:
        self.plan.backward(*call, _get_num_threads(), params)

    def launch_normed(self, call: tuple[Any, ...], norm: NormWeights, out: Tensor, params: tuple[int, ...]) -> None:
        """Write the input of the norm to norm.rows for backward, or to out, which then changes."""
        weight, bias = readable(norm.weight, "norm.weight"), readable(norm.bias, "norm.bias")
        of_norm = addresses((weight, bias, out if norm.rows is None else norm.rows))
        self.plan.forward_normed(*call, of_norm, norm.eps, _get_num_threads(), params)

    def launch_normed_backward(self, call: tuple[Any, ...], norm: NormWeights, params: tuple[int, ...]) -> None:
        assert norm.rows is not None
        rows, weight = readable(norm.rows, "the input of the norm"), readable(norm.weight, "norm.weight")
        of_norm = addresses((weight, rows, norm.grad_rows))
        self.plan.backward_normed(*call, of_norm, norm.eps, _get_num_threads(), params)
