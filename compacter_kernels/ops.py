"""The fused impls as torch.library operators, for torch.compile, torch.export and dispatch modes.

Each operator is one node of their graphs. Plain eager calls do not come here. `impl` names a fused
impl; those of plain torch need no operator.
"""

from __future__ import annotations

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
_kernels: dict[tuple[Problem, str], Any] = {}


def _kernel(problem: Problem, impl: str) -> Any:
    kernel = _kernels.get((problem, impl))
    if kernel is None:
        kernel = _kernels[problem, impl] = dispatch.plan(problem, impl).kernel
    return kernel


def _present(grads: tuple[Tensor | None, ...], x: Tensor) -> list[Tensor]:
    """The gradients with an empty tensor for an absent bias: an operator returns tensors."""
    return [x.new_empty(0) if grad is None else grad for grad in grads]


def _second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def _empty_gradients(*tensors: Tensor | None, like: Tensor) -> list[Tensor]:
    return [
        like.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors
    ]


def _absent(grads: list[Tensor], tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The reverse of `_present`."""
    return tuple(None if t is None else grad for grad, t in zip(grads, tensors, strict=True))


@torch.library.custom_op("compacter_kernels::phm_linear", mutates_args=())
def _linear(x: Tensor, rule: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    call = LinearCall(x, PHMWeights(rule, left, right, bias))
    result: Tensor = _kernel(linear_problem(*call), impl).forward(call)
    return result


@_linear.register_fake
def _(x: Tensor, rule: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], right.shape[0] * right.shape[2]))


@torch.library.custom_op("compacter_kernels::phm_linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor, x: Tensor, rule: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, impl: str
) -> list[Tensor]:
    call = LinearCall(x, PHMWeights(rule, left, right, bias))
    return _present(_kernel(linear_problem(*call), impl).backward(call, grad, (True,) * 5), x)


@_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, rule: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, impl: str
) -> list[Tensor]:
    return _empty_gradients(x, rule, left, right, bias, like=x)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _linear_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    return (*_absent(_linear_backward(grad, *tensors, ctx.impl), tensors), None)


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)
_linear_backward.register_autograd(_second_derivative)


@torch.library.custom_op("compacter_kernels::adapter", mutates_args=())
def _adapter(
    x: Tensor,
    residual: Tensor | None,
    down_rule: Tensor,
    down_left: Tensor,
    down_right: Tensor,
    down_bias: Tensor | None,
    up_rule: Tensor,
    up_left: Tensor,
    up_right: Tensor,
    up_bias: Tensor | None,
    add_x: bool,
    activation: str,
    scale: float,
    impl: str,
) -> Tensor:
    down = PHMWeights(down_rule, down_left, down_right, down_bias)
    up = PHMWeights(up_rule, up_left, up_right, up_bias)
    kernel = _kernel(adapter_problem(x, down, up, activation), impl)
    result: Tensor = kernel.forward(AdapterCall(x, down, up, residual, add_x, scale))
    return result


@_adapter.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("compacter_kernels::adapter_backward", mutates_args=())
def _adapter_backward(
    grad: Tensor,
    x: Tensor,
    down_rule: Tensor,
    down_left: Tensor,
    down_right: Tensor,
    down_bias: Tensor | None,
    up_rule: Tensor,
    up_left: Tensor,
    up_right: Tensor,
    up_bias: Tensor | None,
    add_x: bool,
    activation: str,
    scale: float,
    impl: str,
) -> list[Tensor]:
    down = PHMWeights(down_rule, down_left, down_right, down_bias)
    up = PHMWeights(up_rule, up_left, up_right, up_bias)
    kernel = _kernel(adapter_problem(x, down, up, activation), impl)
    return _present(kernel.backward(AdapterCall(x, down, up, None, add_x, scale), grad, (True,) * 9), x)


@_adapter_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return _empty_gradients(x, *rest[:8], like=x)


def _adapter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, *params = inputs[:10]
    ctx.options = inputs[10:]
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, *params)


def _adapter_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grad_x, *grads = _absent(_adapter_backward(grad, *tensors, *ctx.options), tensors)
    return (grad_x, grad if ctx.has_residual else None, *grads, None, None, None, None)


_adapter.register_autograd(_adapter_grad, setup_context=_adapter_setup)
_adapter_backward.register_autograd(_second_derivative)


def forward(call: Call, problem: Problem, impl: str) -> Tensor:
    """Run the call through its operator."""
    result: Tensor
    if call.__class__ is LinearCall:
        x, weights = call
        result = _linear(x, *weights, impl)
    else:
        assert isinstance(call, AdapterCall) and problem.activation is not None
        x, down, up, residual, add_x, scale, _ = call
        result = _adapter(x, residual, *down, *up, add_x, problem.activation.name, scale, impl)
    return result
