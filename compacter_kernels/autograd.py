"""The fused impls under autograd. Saved for backward: x and the parameters, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.impl import AdapterKernel, LinearKernel
from compacter_kernels.ops import NO_SECOND_DERIVATIVE
from compacter_kernels.weights import PHMWeights


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients on; a second derivative raises instead of being silently zero."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        return tuple(None if grad is None else grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def _once(grads: tuple[Tensor | None, ...], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """Guard gradients computed under create_graph=True; the inputs tie the guard to the graph that made them."""
    if not torch.is_grad_enabled():
        return grads
    guarded: tuple[Tensor | None, ...] = _OnceDifferentiable.apply(len(grads), *grads, *inputs)
    return guarded


def _projections(params: Sequence[Tensor | None]) -> tuple[PHMWeights, PHMWeights]:
    """rule, left, right, bias of down, then of up."""
    return PHMWeights._make(params[:4]), PHMWeights._make(params[4:])


class LinearFunction(torch.autograd.Function):
    """phm_linear through a fused kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: LinearKernel,
        x: Tensor,
        rule: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(x, rule, left, right, bias)
        return kernel.forward(x, PHMWeights(rule, left, right, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        with torch.no_grad():
            grads = ctx.kernel.backward(x, grad, PHMWeights(*params), ctx.needs_input_grad[1:])
        return (None, *_once(grads, grad, x, *params))


class AdapterFunction(torch.autograd.Function):
    """compacter_adapter through a fused kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: AdapterKernel,
        residual: Tensor | None,
        residual_is_x: bool,
        scale: float,
        x: Tensor,
        *params: Tensor | None,
    ) -> Tensor:
        ctx.kernel, ctx.residual_is_x, ctx.scale = kernel, residual_is_x, scale
        ctx.save_for_backward(x, *params)
        down, up = _projections(params)
        return kernel.forward(x, x if residual_is_x else residual, scale, down, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        down, up = _projections(params)
        wanted = ctx.needs_input_grad
        with torch.no_grad():
            grads = ctx.kernel.backward(x, grad, ctx.residual_is_x, ctx.scale, down, up, wanted[4:])
        return (None, grad if wanted[1] else None, None, None, *_once(grads, grad, x, *params))


def _apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Function.apply without what it does in Python for functorch, a fifth of the host time of a call."""
    plain = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*args) if _transforming() else plain(*args)

    return apply


_transforming = torch._C._are_functorch_transforms_active
apply_linear, apply_adapter = _apply(LinearFunction), _apply(AdapterFunction)
