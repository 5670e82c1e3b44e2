"""Fused C++ kernels (csrc/cpu): one pass over x forward, one pass over x and the gradient backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compacter_kernels.calls import AdapterCall
from compacter_kernels.impl import Gradients, Kernel, empty_gradients, native, not_fused
from compacter_kernels.impl.memory import addresses, readable
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


def prepare(problem: Problem) -> Kernel[Any]:
    """The kernel for this problem."""
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

    def forward(self, call: AdapterCall, out: Tensor | None = None) -> Tensor:
        x, down, up, residual, add_x, scale, norm = call
        if norm is None:
            return super().forward(call, out)
        x, params = readable(x, "x"), self.parameters.readable((*down, *up))
        weight, bias = readable(norm.weight, "norm.weight"), readable(norm.bias, "norm.bias")
        if residual is not None:
            residual = readable(residual, "residual")
        if out is None:
            out = torch.empty_like(x)
        rows = out if norm.rows is None else norm.rows
        self.plan.forward_normed(
            *addresses((x, residual, out, weight, bias, rows)),
            add_x,
            x.numel() // self.width,
            scale,
            norm.eps,
            _get_num_threads(),
            self.parameters.addresses(params),
        )
        return out

    def backward(self, call: AdapterCall, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        norm = call.norm
        if norm is None:
            return super().backward(call, grad, wanted)
        x = readable(call.x, "x")
        grad, params = readable(grad, "the gradient of the output"), self.parameters.readable((*call.down, *call.up))
        assert norm.rows is not None
        rows, weight = readable(norm.rows, "what is normed"), readable(norm.weight, "norm.weight")
        results = empty_gradients([x, *params], wanted)
        grad_x, *grads = addresses(results)
        self.plan.backward_normed(
            *addresses((x, grad, weight, rows, norm.grad_rows)),
            grad_x,
            call.add_x,
            x.numel() // self.width,
            call.scale,
            norm.eps,
            _get_num_threads(),
            self.parameters.addresses(params) + grads,
        )
        return tuple(results)
