"""The arguments of the public functions, packed into the call that every kernel takes.

In a call, scale is a number, and at most one residual is not x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from compacter_kernels.calls import AdapterCall, BankCall, LinearCall, explain_failure
from compacter_kernels.impl.memory import check_for_torch
from compacter_kernels.problem import adapter_problem, check_choice, check_like, check_tensor, linear_problem
from compacter_kernels.weights import LinearWeights, NormWeights, PHMWeights, Weights

Activation = str | Callable[[Tensor], Tensor]
Residual = Tensor | tuple[Tensor, Tensor] | None
W = TypeVar("W", bound=Weights)


def linear_call(x: Tensor, weights: PHMWeights, base: Tensor | None, scale: float | Tensor) -> LinearCall:
    """The call of kronecker_linear."""
    check = partial(linear_problem, x, weights)
    if base is not None:
        _check_added(base, "base", x, lambda: (*x.shape[:-1], weights.out_features), check)
    if not isinstance(scale, float):
        weights, scale = _with_scale(weights, "weights", scale, check)
    return LinearCall(x, weights, base, scale)


def adapter_call(
    x: Tensor, down: Weights, up: Weights, residual: Residual, scale: float | Tensor, norm: NormWeights | None
) -> AdapterCall:
    """The call of compacter_adapter or bottleneck_adapter."""
    if residual is x:
        added, add_x = None, True
    elif residual is None:
        added, add_x = None, False
    else:
        added, add_x = _split(residual, x, partial(adapter_problem, x, down, up, "identity"))
    if not isinstance(scale, float):
        up, scale = _with_scale(up, "up", scale, partial(adapter_problem, x, down, up, "identity"))
    return AdapterCall(x, down, up, added, add_x, scale, norm)


def bank_call(
    x: Tensor,
    down: Weights,
    up: Weights,
    route: Tensor | None,
    mix: Tensor | None,
    residual: Residual,
    scale: float | Tensor,
    norm: NormWeights | None,
) -> BankCall:
    """The call of compacter_adapter_bank: route and mix get one entry for each group of rows."""
    for weights, name in ((down, "down"), (up, "up")):
        if not isinstance(weights, (PHMWeights, LinearWeights)):
            raise TypeError(f"{name} must be PHMWeights or LinearWeights, got {type(weights).__name__}")
    factor: Any = down.slots()[1]
    check_tensor(x, "x")
    name, ndim = ("down.weight", 3) if isinstance(down, LinearWeights) else ("down.left", 4)
    check_tensor(factor, name, ndim)
    adapters = factor.shape[0]
    check = partial(adapter_problem, x, down, up, "identity", adapters)
    check_choice(x, route, mix, adapters)
    choice, name = (route, "route") if mix is None else (mix, "mix")
    if choice is not None and (choice.dtype == torch.int32 or not choice.is_contiguous()):  # torch copies it below
        check_for_torch([(name, choice)])
    added, add_x = (None, False) if residual is None else _split(residual, x, check)
    if not isinstance(scale, float):
        up, scale = _with_scale(up, "up", scale, check, adapters)
    if route is not None:
        route = route.long().reshape(-1)
    if mix is not None:
        mix = mix.reshape(-1, adapters)
    return BankCall(x, down, up, added, add_x, scale, norm, route, mix)


def _split(residual: Tensor | tuple[Tensor, ...], x: Tensor, check: Callable[[], object]) -> tuple[Tensor | None, bool]:
    """The residual that is not x, and whether x is added."""
    if residual is x:
        return None, True
    if not isinstance(residual, tuple):
        _check_added(residual, "residual", x, lambda: x.shape, check)
        return residual, False
    if len(residual) != 2:
        raise TypeError(f"residual must be a tensor or two of them, got a tuple of {len(residual)}")
    first, second = residual if residual[1] is x else residual[::-1]
    for each in (first, second):
        _check_added(each, "residual", x, lambda: x.shape, check)
    if second is x:
        return first, True
    check_for_torch([("residual", first), ("residual", second)])
    return first + second, False


def _check_added(
    added: Tensor, name: str, x: Tensor, shape: Callable[[], tuple[int, ...]], check: Callable[[], object]
) -> None:
    """Raise for a tensor that cannot be added, or for an error of the others, which comes first."""
    try:
        like = added.shape == shape() and added.dtype == x.dtype and added.device == x.device
        like = like and added.layout is torch.strided
    except (AttributeError, RuntimeError, IndexError, TypeError):  # not a tensor, or a nested tensor
        like = False
    if not like:
        check()
        check_like(added, name, x, shape())


def _with_scale(
    weights: W, name: str, scale: float | Tensor, check: Callable[[], object], adapters: int = 1
) -> tuple[W, float]:
    """Return the weights and scale as a number.

    A tensor is multiplied into the weights, where autograd sees it.
    """
    if isinstance(scale, Tensor):
        check()
        check_tensor(scale, "scale")
        if scale.numel() not in (1, adapters):
            numbers = "one number" if adapters == 1 else f"one number or of {adapters}"
            raise ValueError(f"scale must be a number or a tensor of {numbers}, got shape {tuple(scale.shape)}")
        if scale.device != weights[0].device:
            raise ValueError(f"scale is on {scale.device}, {name} on {weights[0].device}; move one of them")
        named = [*weights.named(name), ("scale", scale)]
        check_for_torch(named)
        try:
            return weights.scaled(scale), 1.0  # type: ignore[return-value]
        except Exception as error:
            explain_failure(named, error)
            raise
    if not isinstance(scale, (float, int)):
        raise TypeError(f"scale must be a number or a tensor of one number, got {type(scale).__name__}")
    return weights, float(scale)
