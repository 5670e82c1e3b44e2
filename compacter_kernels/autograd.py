"""The fused impls under autograd.

Backward gets x and the parameters saved, and the input of the norm where a norm follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compacter_kernels.calls import AdapterCall, BankCall, Call, LinearCall
from compacter_kernels.impl import Gradients, Kernel
from compacter_kernels.ops import NO_SECOND_DERIVATIVE
from compacter_kernels.private import direct_apply, graph_is_kept, saved_tensors_hooks
from compacter_kernels.weights import LinearWeights, NormWeights, PHMWeights, Weights


def forward(kernel: Kernel, call: Call) -> Tensor:
    """Run kernel.forward(call) and record it for backward."""
    result: Tensor
    if call.__class__ is LinearCall:
        x, weights, base, _ = call
        result = LinearFunction.apply(kernel, call, base, x, *weights)
    elif call.__class__ is BankCall:
        x, down, up, residual, *_, mix = call
        result = BankFunction.apply(kernel, call, residual, mix, x, *down, *up)
    else:
        x, down, up, residual, _, _, norm = call  # type: ignore[misc]
        if norm is None:
            result = AdapterFunction.apply(kernel, call, residual, x, *down, *up)
        else:
            result = NormedFunction.apply(kernel, call, residual, x, norm.weight, norm.bias, *down, *up)
    return result


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients on. A second derivative raises, where it would silently be zero."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        return tuple(None if grad is None else grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def _gradients(kernel: Kernel, call: Call, grad: Tensor, wanted: Any, inputs: Any, of_norm: Any = ()) -> Gradients:
    """of_norm, which kernel.backward fills, and the result of kernel.backward.

    Under create_graph=True both are guarded. The inputs connect the guard with their graph.
    """
    if not torch.is_grad_enabled():  # mostly so; entering `no_grad` takes time
        return (*of_norm, *kernel.backward(call, grad, wanted))
    with torch.no_grad():
        grads = (*of_norm, *kernel.backward(call, grad, wanted))
    guarded: Gradients = _OnceDifferentiable.apply(len(grads), *grads, grad, *inputs)
    return guarded


def _sides(params: list[Any]) -> tuple[Weights, Weights]:
    """The weights of down and up from all their tensors."""
    half = len(params) // 2
    kind = PHMWeights if half == 4 else LinearWeights
    return kind(*params[:half]), kind(*params[half:])


class LinearFunction(torch.autograd.Function):
    """A projection alone. `call` holds the same tensors as the other arguments."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, call: LinearCall, _: Any, x: Tensor, *params: Tensor | None) -> Tensor:
        ctx.rest = kernel, call.scale
        ctx.save_for_backward(x, *params)
        return kernel.forward(call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        kernel, scale = ctx.rest
        _, _, base_wanted, *wanted = ctx.needs_input_grad
        call = LinearCall(x, PHMWeights(*params), None, scale)
        grads = _gradients(kernel, call, grad, tuple(wanted), (x, *params))
        return (None, None, grad if base_wanted else None, *grads)


class AdapterFunction(torch.autograd.Function):
    """An adapter without a norm. `call` holds the tensors of the other arguments."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, call: AdapterCall, _: Any, x: Tensor, *params: Tensor | None) -> Tensor:
        ctx.rest = kernel, call.add_x, call.scale
        ctx.save_for_backward(x, *params)
        return kernel.forward(call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        kernel, add_x, scale = ctx.rest
        _, _, residual_wanted, *wanted = ctx.needs_input_grad
        call = AdapterCall(x, *_sides(params), None, add_x, scale)
        grads = _gradients(kernel, call, grad, tuple(wanted), (x, *params))
        return (None, None, grad if residual_wanted else None, *grads)


class NormedFunction(torch.autograd.Function):
    """compacter_adapter with a norm. `call` holds the tensors of the other arguments.

    The norm is frozen, and x or a parameter requires a gradient, so that a second derivative raises
    by their graph. Backward overwrites the saved input of the norm with its gradient, unless the
    graph is kept or a saved-tensor hook has seen the input.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, call: AdapterCall, _: Any, x: Tensor, *norm_and_params: Any) -> Tensor:
        norm = call.norm
        assert norm is not None
        ctx.rest = kernel, call.add_x, call.scale, norm.eps, saved_tensors_hooks(False) is None
        rows = torch.empty_like(x, memory_format=torch.contiguous_format)
        out = kernel.forward(call._replace(norm=norm._replace(rows=rows)))
        ctx.save_for_backward(x, rows, *norm_and_params)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, weight, bias, *params = ctx.saved_tensors
        kernel, add_x, scale, eps, own = ctx.rest
        _, _, residual_wanted, x_wanted, _, _, *params_wanted = ctx.needs_input_grad
        of_norm = rows if own and not graph_is_kept() else torch.empty_like(rows)
        norm = NormWeights(weight, bias, eps, rows, of_norm)
        call = AdapterCall(x, *_sides(params), None, add_x, scale, norm)
        grads = _gradients(kernel, call, grad, (x_wanted, *params_wanted), (x, *params), (of_norm,))
        of_residual, of_x, *others = grads
        return (None, None, of_residual if residual_wanted else None, of_x, None, None, *others)


class BankFunction(torch.autograd.Function):
    """A bank of adapters. `call` holds the tensors of the other arguments."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, call: BankCall, _: Any, mix: Any, x: Tensor, *params: Tensor | None
    ) -> Tensor:
        ctx.rest = kernel, call.add_x, call.scale
        ctx.save_for_backward(call.route, mix, x, *params)
        return kernel.forward(call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        route, mix, x, *params = ctx.saved_tensors
        kernel, add_x, scale = ctx.rest
        _, _, residual_wanted, mix_wanted, *wanted = ctx.needs_input_grad
        call = BankCall(x, *_sides(params), None, add_x, scale, None, route, mix)
        *grads, of_mix = _gradients(kernel, call, grad, (*wanted, mix_wanted), (x, *params, mix))
        return (None, None, grad if residual_wanted else None, of_mix, *grads)


for function in (LinearFunction, AdapterFunction, NormedFunction, BankFunction):
    function.apply = direct_apply(function)  # type: ignore[method-assign]
