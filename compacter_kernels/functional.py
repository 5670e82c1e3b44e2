"""The public functions: check the arguments once per signature, pick the impl, run it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compacter_kernels import dispatch, ops
from compacter_kernels.activations import resolve
from compacter_kernels.autograd import AdapterFunction, LinearFunction
from compacter_kernels.impl import forward_with
from compacter_kernels.impl.precision import without_autocast
from compacter_kernels.problem import Problem, adapter_problem, check_like, check_scale, check_weights, linear_problem
from compacter_kernels.weights import PHMWeights, kronecker_sum

_plans: dict[Any, dispatch.Plan] = {}
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def _signature(weights: PHMWeights) -> tuple[Any, ...]:
    """All that the checks depend on, cheap enough to be taken in every call."""
    rule, left, right, bias = weights
    if right is None or bias is None:
        return (weights.__class__, *[None if t is None else (t.shape, t.dtype, t.device) for t in weights])
    return (
        weights.__class__,
        rule.shape,
        rule.dtype,
        rule.device,
        left.shape,
        left.dtype,
        left.device,
        right.shape,
        right.dtype,
        right.device,
        bias.shape,
        bias.dtype,
        bias.device,
    )


# os.environ raises and catches two exceptions for a variable that is not set, in every call; its raw dict does not.
_environ: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_variable = os.environ.encodekey(dispatch.ENVIRONMENT)


def _auto(impl: str) -> Any:
    """What "auto" means now, as part of a signature."""
    return _environ.get(_variable) if impl == "auto" else None


def any_requires_grad(weights: PHMWeights) -> bool:
    """Whether one of these weights does; the short way for every call."""
    rule, left, right, bias = weights
    return (
        rule.requires_grad
        or left.requires_grad
        or (right is not None and right.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


def phm_matrix(weights: PHMWeights) -> Tensor:
    """The matrix H = sum_i A_i (x) (s_i t_i) of a projection, y = x H + b (arXiv 2106.04647, equation 5).

    H[p * in/n + u, q * out/n + v] = sum_i rule[i, p, q] (left_i right_i)[u, v].

    Returns:
        (in, out), contiguous, differentiable; in the widest dtype of the weights and never below float32, since most
        entries are subnormal in float16 at the paper's initialisation.

    Raises:
        TypeError, ValueError: weights that do not fit together; the message names the field.
    """
    check_weights(weights, "weights")
    dtype = torch.promote_types(torch.float32, weights.rule.dtype)
    for factor in (weights.left, weights.right):
        if factor is not None:
            dtype = torch.promote_types(dtype, factor.dtype)
    return without_autocast(kronecker_sum)(weights, dtype)


def phm_linear(x: Tensor, weights: PHMWeights, *, impl: str = "auto") -> Tensor:
    """y = x H + b with H = sum_i A_i (x) (s_i t_i) (arXiv 2106.04647, equation 5); H is built by impl="dense" only.

    Args:
        x: (..., in), float32, bfloat16, float16 or float64; any strides.
        weights: the projection in -> out, in any float dtypes.
        impl: "auto", "dense", "factored", "cpu", "triton" or "cuda".

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit impl that cannot serve this call.
    """
    if torch.compiler.is_compiling():
        name, _ = dispatch.choose(linear_problem(x, weights), impl)
        compiled: Tensor = (
            dispatch.IMPLS[name].linear(x, weights) if name in dispatch.PLAIN else ops.linear(x, weights, name)
        )
        return compiled
    try:
        key = ("linear", x.shape[-1], x.dtype, x.device, x.layout, _signature(weights), impl, _auto(impl))
        plan = _plans.get(key)
    except (AttributeError, IndexError, TypeError, ValueError):
        plan, key = None, None  # the checks below say what is wrong
    if plan is None:
        plan = _plans[key] = dispatch.plan(linear_problem(x, weights), impl)
    if plan.kernel is None:
        result: Tensor = plan.module.linear(x, weights)
    elif x.__class__ not in PLAIN_TENSORS:
        result = ops.linear(x, weights, plan.name)
    elif torch.is_grad_enabled() and (x.requires_grad or any_requires_grad(weights)):
        result = LinearFunction.apply(plan.kernel, x, *weights)
    else:
        result = plan.kernel.forward(x, weights)
    return result


def compacter_adapter(
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights,
    *,
    activation: str | Callable[[Tensor], Tensor] = "gelu_new",
    residual: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """scale * up(act(down(x))) [+ residual]: a whole Compacter adapter (arXiv 2106.04647, section 3).

    Args:
        x: (..., k), float32, bfloat16, float16 or float64; any strides.
        down, up: the projections k -> d and d -> k, in any float dtypes.
        activation: a name of `compacter_kernels.activations.FUSED` or any callable; a callable is not fused.
        residual: a tensor with the shape and dtype of x, or two of them, both to be added. x itself, the usual adapter,
            costs no second read; a second one beside x costs "cpu" a read, the others an addition of torch's.
        scale: a number, or a tensor of one number (differentiable).
        out: where to write, like x; only where no gradient is recorded. It may overlap the inputs.
        impl: "auto", "dense", "factored", "cpu", "triton" or "cuda".

    Returns:
        (..., k), contiguous, in x's dtype; or `out`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit impl that cannot serve this call.
    """
    if not isinstance(scale, float):
        up, scale = with_scale(up, scale)
    if torch.compiler.is_compiling():
        return _compiled_adapter(x, down, up, activation, residual, scale, out, impl)
    plan = adapter_plan(x, down, up, activation, impl)
    also_x = False  # besides the residual
    if isinstance(residual, tuple):
        residual, also_x = _two_residuals(x, residual, out is None and plan.kernel is not None)
    elif residual is not None and residual is not x:
        check_like(residual, "residual", x, x.shape)
    if out is not None:
        return _adapter_into(out, plan, x, down, up, activation, residual, scale)
    if plan.kernel is None:
        result: Tensor = plan.module.adapter(x, down, up, resolve(activation), residual, scale)
    elif x.__class__ not in PLAIN_TENSORS:
        result = ops.adapter(x, residual, also_x, scale, down, up, str(activation), plan.name)
    elif torch.is_grad_enabled() and (
        x.requires_grad
        or any_requires_grad(down)
        or any_requires_grad(up)
        or (residual is not None and residual.requires_grad)
    ):
        same = residual is x
        result = AdapterFunction.apply((plan.kernel, same or also_x, scale), None if same else residual, x, *down, *up)
    elif also_x:
        result = forward_with(plan.kernel, x, residual, True, scale, down, up)
    else:
        result = plan.kernel.forward(x, residual, scale, down, up)
    return result


def adapter_plan(
    x: Tensor, down: PHMWeights, up: PHMWeights, activation: str | Callable[[Tensor], Tensor], impl: str
) -> dispatch.Plan:
    """The plan of a call of `compacter_adapter`; raises what that raises."""
    try:
        projections = (_signature(down), _signature(up))
        key = (x.shape[-1], x.dtype, x.device, x.layout, projections, activation, impl, _auto(impl))
        plan = _plans.get(key)
    except (AttributeError, IndexError, TypeError, ValueError):
        plan, key = None, None  # the checks below say what is wrong
    if plan is None:
        plan = dispatch.plan(adapter_problem(x, down, up, activation), impl)
        if isinstance(activation, str):
            _plans[key] = plan
    return plan


def explain(
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights | None = None,
    *,
    activation: str | Callable[[Tensor], Tensor] = "gelu_new",
    residual: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    impl: str = "auto",
) -> dispatch.Explanation:
    """The impl that `compacter_adapter(x, down, up, ...)`, or without `up` `phm_linear(x, down)`, takes, and why.

    Takes the arguments of that call (residual and out do not change the choice) and raises what it would raise.
    """
    if up is None:
        return dispatch.explain(linear_problem(x, down), impl)
    up, _ = with_scale(up, scale)
    explanation = dispatch.explain(adapter_problem(x, down, up, activation), impl)
    if isinstance(residual, tuple):
        residual, _ = _two_residuals(x, residual, False)
    _check_extras(x, down, up, residual, out)
    return explanation


def _two_residuals(x: Tensor, pair: tuple[Tensor, Tensor], fused: bool) -> tuple[Tensor, bool]:
    """One residual, and whether x is to be added besides, which takes a call that can do it (fused)."""
    if len(pair) != 2:
        raise TypeError(f"residual must be a tensor or two of them, got a tuple of {len(pair)}")
    one, other = pair if pair[1] is x else pair[::-1]
    check_like(one, "residual", x, x.shape)
    if other is not x:
        check_like(other, "residual", x, x.shape)
    return (one, True) if fused and other is x and one is not x else (one + other, False)


def with_scale(up: PHMWeights, scale: float | Tensor) -> tuple[PHMWeights, float]:
    """A number as it is; a tensor as weights of up, where autograd differentiates it."""
    if isinstance(scale, Tensor):
        check_weights(up, "up")
        check_scale(scale, up)
        return up.scaled(scale.reshape(())), 1.0
    if not isinstance(scale, (float, int)):
        raise TypeError(f"scale must be a number or a tensor of one number, got {type(scale).__name__}")
    return up, float(scale)


def _check_extras(x: Tensor, down: PHMWeights, up: PHMWeights, residual: Tensor | None, out: Tensor | None) -> None:
    """Raise for a residual or an out that does not fit an otherwise good call."""
    if residual is not None and residual is not x:
        check_like(residual, "residual", x, x.shape)
    if out is not None:
        check_like(out, "out", x, x.shape)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, x, residual, *down, *up)):
            raise ValueError("out= records no gradient; call under torch.no_grad(), or without out=")


def _compiled_adapter(
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights,
    activation: str | Callable[[Tensor], Tensor],
    residual: Tensor | tuple[Tensor, Tensor] | None,
    scale: float,
    out: Tensor | None,
    impl: str,
) -> Tensor:
    problem: Problem = adapter_problem(x, down, up, activation)
    name, _ = dispatch.choose(problem, impl)
    also_x = False
    if isinstance(residual, tuple):
        residual, also_x = _two_residuals(x, residual, out is None and name not in dispatch.PLAIN)
    _check_extras(x, down, up, residual, out)
    assert problem.activation is not None
    if name in dispatch.PLAIN:
        result: Tensor = dispatch.IMPLS[name].adapter(x, down, up, problem.activation, residual, scale)
    else:
        result = ops.adapter(x, residual, also_x, scale, down, up, problem.activation.name, name)
    return result if out is None else out.copy_(result)


def _shares_memory(out: Tensor, other: Tensor | None) -> bool:
    return other is not None and out.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _adapter_into(
    out: Tensor,
    plan: dispatch.Plan,
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights,
    activation: str | Callable[[Tensor], Tensor],
    residual: Tensor | None,
    scale: float,
) -> Tensor:
    """Write the result into `out`: directly where it is contiguous and apart from the inputs, else through a copy."""
    _check_extras(x, down, up, residual, out)
    if plan.kernel is None:
        return out.copy_(plan.module.adapter(x, down, up, resolve(activation), residual, scale))
    if out.is_contiguous() and not any(_shares_memory(out, t) for t in (x, residual, *down, *up)):
        plan.kernel.forward(x, residual, scale, down, up, out)
        return out
    return out.copy_(plan.kernel.forward(x, residual, scale, down, up))
