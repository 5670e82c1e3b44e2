"""Fused C++ kernels (csrc/cpu): one pass over x forward, one pass over x and the gradient backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compacter_kernels.impl import Gradients, empty_gradients, native, not_fused
from compacter_kernels.problem import Problem
from compacter_kernels.weights import NormWeights, PHMWeights

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
    adds_both = norms = True

    def forward_normed(
        self,
        x: Tensor,
        residual: Tensor,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        norm: NormWeights,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        x, residual, params = x.contiguous(), residual.contiguous(), self.contiguous((*down, *up))
        weight, bias = norm.weight.contiguous(), norm.bias.contiguous()
        out = torch.empty_like(x)
        y = torch.empty_like(x) if keep else out
        self.plan.forward_normed(
            x.data_ptr(),
            residual.data_ptr(),
            y.data_ptr(),
            out.data_ptr(),
            x.numel() // self.width,
            scale,
            weight.data_ptr(),
            bias.data_ptr(),
            norm.eps,
            _get_num_threads(),
            self.addresses(params),
        )
        return out, y

    def backward_normed(
        self,
        x: Tensor,
        y: Tensor,
        grad: Tensor,
        scale: float,
        down: PHMWeights,
        up: PHMWeights,
        norm: NormWeights,
        wanted: tuple[bool, ...],
        spend: bool,
    ) -> Gradients:
        x, grad, params = x.contiguous(), grad.contiguous(), self.contiguous((*down, *up))
        weight = norm.weight.contiguous()
        grad_y, results = y if spend else torch.empty_like(y), empty_gradients([x, *params], wanted)
        grad_x, *grads = native.addresses(results)
        self.plan.backward_normed(
            x.data_ptr(),
            y.data_ptr(),
            grad.data_ptr(),
            grad_y.data_ptr(),
            grad_x,
            x.numel() // self.width,
            scale,
            weight.data_ptr(),
            norm.eps,
            _get_num_threads(),
            self.addresses(params) + grads,
        )
        return (grad_y, *results)
