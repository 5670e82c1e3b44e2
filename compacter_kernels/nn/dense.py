"""A dense projection as it is read, and what a layer of given weights takes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.problem import FLOATS
from compacter_kernels.weights import PHMWeights

DenseProjection = nn.Linear | Tensor | tuple[Tensor, Tensor | None]


def read_projection(projection: object, name: str) -> tuple[Tensor, Tensor | None]:
    """The checked weight (out, in) and bias of an nn.Linear, a weight or a pair (weight, bias)."""
    if isinstance(projection, nn.Linear):
        weight, bias = projection.weight, projection.bias
    elif isinstance(projection, Tensor):
        weight, bias = projection, None
    elif isinstance(projection, (tuple, list)) and len(projection) == 2:
        weight, bias = projection
    else:
        kinds = "an nn.Linear, a weight (out, in) or a pair (weight, bias)"
        raise TypeError(f"{name} must be {kinds}, got {type(projection).__name__}")
    for tensor, field, ndim in [(weight, "weight", 2), *([] if bias is None else [(bias, "bias", 1)])]:
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}.{field} must be a float32, bfloat16, float16 or float64 tensor, got {got}")
        if tensor.ndim != ndim or 0 in tensor.shape or tensor.shape[0] != weight.shape[0]:
            shape = "(out, in)" if ndim == 2 else f"({weight.shape[0]},)"
            raise ValueError(f"{name}.{field} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device.type == "meta":
            raise ValueError(f"{name}.{field} is on the meta device and has no values; load the adapter first")
        if not tensor.isfinite().all():
            raise ValueError(f"{name}.{field} holds NaN or infinite values")
    return weight, bias


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """A context that keeps the random state, although new modules draw their weights."""
    if device.type in ("cpu", "meta"):
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def rounded(weights: PHMWeights, dtype: torch.dtype, keep_rule: bool = False) -> PHMWeights:
    """The weights rounded to `dtype`, except the bias and, with keep_rule, the rule."""
    rule, left, right, bias = weights
    return PHMWeights(
        rule if keep_rule else rule.to(dtype), left.to(dtype), None if right is None else right.to(dtype), bias
    )


@torch.no_grad()
def load_weights(layer: Any, weights: PHMWeights, with_rule: bool = True) -> None:
    """Copy weights into the parameters of a PHMLinear, the bias only if both have one."""
    if with_rule:
        layer.phm_rule.copy_(weights.rule)
    for name, factor in zip(layer.factor_names(), (weights.left, weights.right), strict=False):
        getattr(layer, name).copy_(factor)
    if weights.bias is not None and layer.b is not None:
        layer.b.copy_(weights.bias)
