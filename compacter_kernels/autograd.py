"""The fused impls under autograd. Saved for backward: x and the parameters; where a norm follows, what it norms too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.impl import AdapterKernel, Gradients, LinearKernel, NormingKernel, forward_with
from compacter_kernels.ops import NO_SECOND_DERIVATIVE
from compacter_kernels.weights import NormWeights, PHMWeights

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


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


def _without_grad(function: Callable[..., Gradients], *args: Any) -> Gradients:
    """function(*args) without recording; entering `no_grad` takes a while, and a backward mostly is without already."""
    if not torch.is_grad_enabled():
        return function(*args)
    with torch.no_grad():
        return function(*args)


def _projections(params: Sequence[Tensor | None]) -> tuple[PHMWeights, PHMWeights]:
    """rule, left, right, bias of down, then of up."""
    return PHMWeights._make(params[:4]), PHMWeights._make(params[4:])


class _Function(torch.autograd.Function):
    """The base of both. The first argument is no tensor, each other is one or None."""

    _plain: Any  # `apply` without what torch does for functorch's tensors where there are none: 4 us of each call

    def __init_subclass__(cls) -> None:
        cls._plain = super(torch.autograd.Function, cls).apply  # type: ignore[misc]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """`Function.apply`. A tensor that a transform left behind has no address, which a kernel finds out first."""
        if not torch._C._are_functorch_transforms_active():
            try:
                return cls._plain(*args)
            except RuntimeError:
                if not any(t is not None and _wrapped(t) for t in args[1:]):
                    raise
        return super().apply(*args)  # type: ignore[no-untyped-call]


class LinearFunction(_Function):
    """phm_linear through a fused kernel."""

    @staticmethod
    def forward(ctx: Any, kernel: LinearKernel, x: Tensor, *params: Tensor | None) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(x, *params)
        return kernel.forward(x, PHMWeights(*params))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        grads = _without_grad(ctx.kernel.backward, x, grad, PHMWeights(*params), ctx.needs_input_grad[1:])
        return (None, *_once(grads, grad, x, *params))


class AdapterFunction(_Function):
    """compacter_adapter through a fused kernel. call: the kernel, whether x is a residual, and scale."""

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[AdapterKernel, bool, float],
        residual: Tensor | None,
        x: Tensor,
        *params: Tensor | None,
    ) -> Tensor:
        ctx.call = kernel, residual_is_x, scale = call
        ctx.save_for_backward(x, *params)
        return forward_with(kernel, x, residual, residual_is_x, scale, *_projections(params))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        kernel, residual_is_x, scale = ctx.call
        wanted = ctx.needs_input_grad
        grads = _without_grad(kernel.backward, x, grad, residual_is_x, scale, *_projections(params), wanted[2:])
        return (None, grad if wanted[1] else None, *_once(grads, grad, x, *params))


class NormedAdapterFunction(_Function):
    """A frozen layer norm of compacter_adapter with x and another residual. call: the kernel, scale and the norm's eps.

    x or a parameter must require a gradient: a second derivative raises by their graph. What was normed gives its
    memory to its gradient where nobody can ask for it again: the graph is not kept, no hook has seen what was saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[NormingKernel, float, float],
        residual: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *params: Tensor | None,
    ) -> Tensor:
        kernel, scale, eps = call
        ctx.call, ctx.own = call, _saving_hooks(False) is None
        norm = NormWeights(weight, bias, eps)
        out, y = kernel.forward_normed(x, residual, scale, *_projections(params), norm, keep=True)
        ctx.save_for_backward(x, y, weight, bias, *params)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, *params = ctx.saved_tensors
        kernel, scale, eps = ctx.call
        _, _, x_wanted, _, _, *params_wanted = ctx.needs_input_grad
        norm, wanted = NormWeights(weight, bias, eps), (x_wanted, *params_wanted)
        spend = ctx.own and not _keeps_graph()
        grads = _without_grad(kernel.backward_normed, x, y, grad, scale, *_projections(params), norm, wanted, spend)
        of_residual, of_x, *others = _once(grads, grad, x, *params)
        return (None, of_residual, of_x, None, None, *others)
