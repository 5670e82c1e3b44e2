"""An adapter with both residuals and the frozen layer norm behind them, where one kernel computes all of it.

y = norm(scale * up(act(down(x))) + x + residual)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.autograd import NormedAdapterFunction
from compacter_kernels.functional import PLAIN_TENSORS, adapter_plan, any_requires_grad, compacter_adapter, with_scale
from compacter_kernels.models.instances import hooked
from compacter_kernels.weights import NormWeights, PHMWeights


def norm_weights(norm: Any, x: Tensor) -> NormWeights | None:
    """The weights of a layer norm that does to rows like x's what nn.LayerNorm does, frozen and unheard; else None."""
    if type(norm) is not nn.LayerNorm or torch.compiler.is_compiling():
        return None
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if weight is None or bias is None or weight.requires_grad or bias.requires_grad:
        return None
    fits = weight.shape == x.shape[-1:] and weight.dtype == bias.dtype == x.dtype and weight.device == x.device
    if not fits or hooked(norm) or not (weight.__class__ in PLAIN_TENSORS and bias.__class__ in PLAIN_TENSORS):
        return None
    return NormWeights(weight, bias, norm.eps)


def normed_adapter(
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights,
    norm: NormWeights,
    *,
    activation: str | Callable[[Tensor], Tensor],
    residual: Tensor,
    scale: float | Tensor,
) -> Tensor:
    """norm(compacter_adapter(x, down, up, residual=(x, residual))); the two must be alike, and not the same tensor."""
    scaled, number = with_scale(up, scale)
    plan = adapter_plan(x, down, scaled, activation, "auto")
    kernel = plan.kernel
    fused = kernel is not None and kernel.norms and x.__class__ in PLAIN_TENSORS and residual.__class__ in PLAIN_TENSORS
    if fused and torch.is_grad_enabled():
        if x.requires_grad or any_requires_grad(down) or any_requires_grad(scaled):
            result: Tensor = NormedAdapterFunction.apply(
                (kernel, number, norm.eps), residual, x, norm.weight, norm.bias, *down, *scaled
            )
            return result
        fused = not residual.requires_grad
    if fused:
        result, _ = kernel.forward_normed(x, residual, number, down, scaled, norm, keep=False)
        return result
    y = compacter_adapter(x, down, up, activation=activation, residual=(x, residual), scale=scale)
    return nn.functional.layer_norm(y, norm.weight.shape, norm.weight, norm.bias, norm.eps)
