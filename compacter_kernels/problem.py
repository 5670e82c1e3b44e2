"""The checked sizes, dtypes and device of a call. A problem is hashable, and is planned once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compacter_kernels.activations import Activation, resolve
from compacter_kernels.weights import NormWeights, PHMWeights

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Projection(NamedTuple):
    """One projection. rank: None if W is unfactorised; dtypes: of rule, left, right, bias."""

    phm_dim: int
    rank: int | None
    in_features: int
    out_features: int
    dtypes: tuple[torch.dtype | None, ...]


class Problem(NamedTuple):
    """A "linear" with one projection and no activation, or an "adapter" with down and up."""

    operation: str
    device: torch.device
    dtype: torch.dtype
    projections: tuple[Projection, ...]
    activation: Activation | None


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch."."""
    return str(dtype).removeprefix("torch.")


def divisors(*widths: int) -> str:
    """The phm_dims that divide all widths, for an error message."""
    return ", ".join(str(n) for n in range(1, min(widths) + 1) if all(w % n == 0 for w in widths))


def check_phm_dim(phm_dim: int, phm_rank: int, **widths: int) -> None:
    """Raise ValueError unless phm_dim divides every width and the rank is at least 1."""
    for name, width in widths.items():
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {width!r}")
    for name, width in widths.items():
        if not isinstance(phm_dim, int) or phm_dim < 1 or width % phm_dim:
            choices = divisors(*widths.values())
            raise ValueError(f"phm_dim={phm_dim!r} does not divide {name}={width}; choose one of {choices}")
    if not isinstance(phm_rank, int) or phm_rank < 1:
        raise ValueError(f"phm_rank must be an integer >= 1, got {phm_rank!r}")


def check_tensor(value: object, name: str, ndim: int | None = None) -> None:
    """Raise unless `value` is a dense float tensor with that many dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype_name(value.dtype)}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")


def check_weights(weights: PHMWeights, name: str) -> Projection:
    """The sizes of these weights; a TypeError or ValueError names a field that does not fit."""
    if not isinstance(weights, PHMWeights):
        raise TypeError(f"{name} must be PHMWeights(rule, left, right, bias), got {type(weights).__name__}")
    rule, left, right, bias = weights
    check_tensor(rule, f"{name}.rule", 3)
    check_tensor(left, f"{name}.left", 3)
    n = rule.shape[0]
    if n == 0 or tuple(rule.shape) != (n, n, n):
        raise ValueError(f"{name}.rule must have shape (phm_dim, phm_dim, phm_dim), got {tuple(rule.shape)}")
    if left.shape[0] != n or 0 in left.shape:
        raise ValueError(f"{name}.left must have shape ({n}, in/{n}, rank), got {tuple(left.shape)}")
    rank = None
    if right is not None:
        check_tensor(right, f"{name}.right", 3)
        rank = left.shape[2]
        if right.shape[0] != n or right.shape[1] != rank or right.shape[2] == 0:
            raise ValueError(f"{name}.right must have shape ({n}, {rank}, out/{n}), got {tuple(right.shape)}")
    if bias is not None:
        check_tensor(bias, f"{name}.bias", 1)
        if bias.shape[0] != weights.out_features:
            raise ValueError(f"{name}.bias must have shape ({weights.out_features},), got {tuple(bias.shape)}")
    for field, tensor in zip(weights._fields, weights, strict=True):
        if tensor is not None and tensor.device != rule.device:
            raise ValueError(f"{name}.{field} is on {tensor.device}, {name}.rule on {rule.device}; move one of them")
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in weights)
    return Projection(n, rank, weights.in_features, weights.out_features, dtypes)


def _check_input(x: Tensor, projection: Projection, weights: PHMWeights, name: str) -> None:
    check_tensor(x, "x")
    width = projection.in_features
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"x must have shape (..., {width}), the input width of {name}, got {tuple(x.shape)}")
    if weights.rule.device != x.device:
        raise ValueError(f"x is on {x.device}, {name} on {weights.rule.device}; move one of them")


def linear_problem(x: Tensor, weights: PHMWeights) -> Problem:
    """The problem of `phm_linear(x, weights)`; a TypeError or ValueError names a wrong argument."""
    projection = check_weights(weights, "weights")
    _check_input(x, projection, weights, "weights")
    return Problem("linear", x.device, x.dtype, (projection,), None)


def adapter_problem(
    x: Tensor, down: PHMWeights, up: PHMWeights, activation: str | Callable[[Tensor], Tensor]
) -> Problem:
    """The problem of `compacter_adapter(x, down, up)`; raises like `linear_problem`."""
    first, second = check_weights(down, "down"), check_weights(up, "up")
    _check_input(x, first, down, "down")
    if second.in_features != first.out_features:
        raise ValueError(f"up takes width {second.in_features}, but down gives width {first.out_features}")
    if second.out_features != first.in_features:
        raise ValueError(f"up gives width {second.out_features}, but x has width {first.in_features}")
    if up.rule.device != x.device:
        raise ValueError(f"x is on {x.device}, up on {up.rule.device}; move one of them")
    return Problem("adapter", x.device, x.dtype, (first, second), resolve(activation))


def check_like(value: object, name: str, x: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise unless `value` has that shape and the dtype, device and layout of the checked x."""
    check_tensor(value, name)
    assert isinstance(value, Tensor)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {dtype_name(x.dtype)}, got {dtype_name(value.dtype)}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, x on {x.device}; move one of them")


def check_norm(norm: NormWeights, x: Tensor) -> None:
    """Raise unless `norm` is a layer norm over the rows of the checked tensor x."""
    if not isinstance(norm, NormWeights):
        raise TypeError(f"norm must be NormWeights(weight, bias, eps), got {type(norm).__name__}")
    for field, tensor in zip(("weight", "bias"), norm, strict=False):
        check_tensor(tensor, f"norm.{field}", 1)
        check_like(tensor, f"norm.{field}", x, x.shape[-1:])
