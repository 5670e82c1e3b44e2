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
LINEAR = "Tensor x, Tensor rule, Tensor left, Tensor right, Tensor? bias, str impl"
PARAMETERS = (
    "Tensor down_rule, Tensor down_left, Tensor down_right, Tensor? down_bias, "
    "Tensor up_rule, Tensor up_left, Tensor up_right, Tensor? up_bias, "
    "bool add_x, str activation, float scale, str impl"
)
_kernels: dict[tuple[Problem, str], Any] = {}


def _kernel(problem: Problem, impl: str) -> Any:
    kernel = _kernels.get((problem, impl))
    if kernel is None:
        kernel = _kernels[problem, impl] = dispatch.plan(problem, impl).kernel
    return kernel


def _linear_call(x: Tensor, *rest: Any) -> tuple[Any, LinearCall]:
    """The kernel and the call of the arguments `LINEAR`."""
    call = LinearCall(x, PHMWeights(*rest[:4]))
    return _kernel(linear_problem(*call), rest[4]), call


def _adapter_call(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Any, AdapterCall]:
    """The kernel and the call of x, a residual and the arguments `PARAMETERS`."""
    down, up, (add_x, activation, scale, impl) = PHMWeights(*rest[:4]), PHMWeights(*rest[4:8]), rest[8:]
    kernel = _kernel(adapter_problem(x, down, up, activation), impl)
    return kernel, AdapterCall(x, down, up, residual, add_x, scale)


def _gradients(kernel: Any, call: Call, grad: Tensor) -> list[Tensor]:
    """All gradients, with an empty tensor for an absent bias, as operators return only tensors."""
    grads = kernel.backward(call, grad, (True,) * len(call.differentiable()))
    return [call.x.new_empty(0) if g is None else g for g in grads]


def _fake_gradients(x: Tensor, *rest: Tensor | None) -> list[Tensor]:
    return [
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *rest)
    ]


def _without_absent(grads: list[Tensor], tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients with None for an absent bias."""
    return tuple(None if t is None else grad for grad, t in zip(grads, tensors, strict=True))


def _second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


@torch.library.custom_op("compacter_kernels::phm_linear", mutates_args=(), schema=f"({LINEAR}) -> Tensor")
def _linear(*args: Any) -> Tensor:
    kernel, call = _linear_call(*args)
    result: Tensor = kernel.forward(call)
    return result


@_linear.register_fake
def _(x: Tensor, rule: Tensor, left: Tensor, right: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], right.shape[0] * right.shape[2]))


@torch.library.custom_op(
    "compacter_kernels::phm_linear_backward", mutates_args=(), schema=f"(Tensor grad, {LINEAR}) -> Tensor[]"
)
def _linear_backward(grad: Tensor, *args: Any) -> list[Tensor]:
    return _gradients(*_linear_call(*args), grad)


@_linear_backward.register_fake
def _(grad: Tensor, *args: Any) -> list[Tensor]:
    return _fake_gradients(*args[:5])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _linear_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    return (*_without_absent(_linear_backward(grad, *tensors, ctx.impl), tensors), None)


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)
_linear_backward.register_autograd(_second_derivative)


@torch.library.custom_op(
    "compacter_kernels::adapter", mutates_args=(), schema=f"(Tensor x, Tensor? residual, {PARAMETERS}) -> Tensor"
)
def _adapter(*args: Any) -> Tensor:
    kernel, call = _adapter_call(*args)
    result: Tensor = kernel.forward(call)
    return result


@_adapter.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "compacter_kernels::adapter_backward", mutates_args=(), schema=f"(Tensor grad, Tensor x, {PARAMETERS}) -> Tensor[]"
)
def _adapter_backward(grad: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
    return _gradients(*_adapter_call(x, None, *args), grad)


@_adapter_backward.register_fake
def _(grad: Tensor, *args: Any) -> list[Tensor]:
    return _fake_gradients(*args[:9])


def _adapter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, *params = inputs[:10]
    ctx.options = inputs[10:]
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, *params)


def _adapter_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grad_x, *grads = _without_absent(_adapter_backward(grad, *tensors, *ctx.options), tensors)
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
