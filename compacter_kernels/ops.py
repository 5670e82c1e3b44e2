"""The fused impls as torch.library operators, for torch.compile, torch.export and dispatch modes.

Each operator is one node of their graphs. Plain eager calls do not come here. `impl` names a fused
impl; those of plain torch need no operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compacter_kernels import dispatch
from compacter_kernels.calls import AdapterCall, Call, LinearCall
from compacter_kernels.problem import Problem, adapter_problem, linear_problem
from compacter_kernels.weights import PHMWeights

NO_SECOND_DERIVATIVE = (
    "the fused impls of compacter_kernels have no second derivative; call with impl='factored' for one"
)
LINEAR = "Tensor rule, Tensor left, Tensor right, Tensor? bias, str impl"
ADAPTER = (
    "Tensor down_rule, Tensor down_left, Tensor down_right, Tensor? down_bias, "
    "Tensor up_rule, Tensor up_left, Tensor up_right, Tensor? up_bias, "
    "bool add_x, str activation, float scale, str impl"
)
_kernels: dict[tuple[Problem, str], Any] = {}


def _kernel_and_call(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Any, Call]:
    """The kernel and the call of an operator. rest: LINEAR or ADAPTER."""
    down, impl = PHMWeights(*rest[:4]), rest[-1]
    call: Call
    if len(rest) == 5:
        call, problem = LinearCall(x, down), linear_problem(x, down)
    else:
        up, (add_x, activation, scale) = PHMWeights(*rest[4:8]), rest[8:-1]
        call, problem = AdapterCall(x, down, up, residual, add_x, scale), adapter_problem(x, down, up, activation)
    kernel = _kernels.get((problem, impl))
    if kernel is None:
        kernel = _kernels[problem, impl] = dispatch.plan(problem, impl).kernel
    return kernel, call


def _define(name: str, options: str, parameters: int, with_residual: bool) -> Callable[..., Tensor]:
    """Define an operator and its backward. parameters: how many of the options are tensors."""
    residual_type = "Tensor? residual, " if with_residual else ""

    @torch.library.custom_op(
        f"compacter_kernels::{name}", mutates_args=(), schema=f"(Tensor x, {residual_type}{options}) -> Tensor"
    )
    def operator(x: Tensor, *args: Any) -> Tensor:
        kernel, call = _kernel_and_call(x, *(args if with_residual else (None, *args)))
        result: Tensor = kernel.forward(call)
        return result

    @operator.register_fake
    def _(x: Tensor, *args: Any) -> Tensor:
        if with_residual:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        right = args[2]
        return x.new_empty((*x.shape[:-1], right.shape[0] * right.shape[2]))

    @torch.library.custom_op(
        f"compacter_kernels::{name}_backward", mutates_args=(), schema=f"(Tensor grad, Tensor x, {options}) -> Tensor[]"
    )
    def backward(grad: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
        """All gradients, with an empty tensor for an absent bias: operators return only tensors."""
        kernel, call = _kernel_and_call(x, None, *args)
        grads = kernel.backward(call, grad, (True,) * (1 + parameters))
        return [x.new_empty(0) if g is None else g for g in grads]

    @backward.register_fake
    def _(grad: Tensor, *args: Any) -> list[Tensor]:
        x, layout = args[0], torch.contiguous_format
        tensors = args[: 1 + parameters]
        return [x.new_empty(0) if t is None else torch.empty_like(t, memory_format=layout) for t in tensors]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *rest = inputs
        ctx.residuals = [rest.pop(0) is not None] if with_residual else []
        ctx.options = rest[parameters:]
        ctx.save_for_backward(x, *rest[:parameters])

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads = backward(grad, *tensors, *ctx.options)
        grad_x, *others = [None if t is None else g for g, t in zip(grads, tensors, strict=True)]
        of_residual = [grad if present else None for present in ctx.residuals]
        return (grad_x, *of_residual, *others, *[None] * len(ctx.options))

    def differentiate_twice(ctx: Any, *_: Any) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    operator.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(differentiate_twice)
    return operator


_linear = _define("phm_linear", LINEAR, parameters=4, with_residual=False)
_adapter = _define("adapter", ADAPTER, parameters=8, with_residual=True)


def forward(call: Call, problem: Problem, impl: str) -> Tensor:
    """Run the call through its operator."""
    if isinstance(call, LinearCall):
        return _linear(call.x, *call.weights, impl)
    assert problem.activation is not None
    x, down, up, residual, add_x, scale, _ = call
    return _adapter(x, residual, *down, *up, add_x, problem.activation.name, scale, impl)
