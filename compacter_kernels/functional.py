"""The public functions. Each packs its arguments into one call, which `route` takes to a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compacter_kernels import dispatch, route
from compacter_kernels.calls import AdapterCall, LinearCall, explain_failure
from compacter_kernels.impl.memory import check_for_torch
from compacter_kernels.impl.plain import without_autocast
from compacter_kernels.problem import adapter_problem, check_like, check_tensor, check_weights
from compacter_kernels.weights import NormWeights, PHMWeights, kronecker_sum

Activation = str | Callable[[Tensor], Tensor]
Residual = Tensor | tuple[Tensor, Tensor] | None


def phm_matrix(weights: PHMWeights) -> Tensor:
    """The matrix H of a projection y = x H + b (arXiv 2106.04647, equation 5).

    H = sum_i A_i (x) (s_i t_i), that is
    H[p * in/n + u, q * out/n + v] = sum_i rule[i, p, q] (left_i right_i)[u, v].

    Returns:
        (in, out), contiguous, differentiable. The dtype is the widest of the weights, but at least
        float32: at the paper's initialisation most entries would be subnormal in float16.

    Raises:
        TypeError, ValueError: the weights do not fit together; the message names the field.
        RuntimeError: the memory of a weight has been freed.
    """
    check_weights(weights, "weights")
    dtype = torch.promote_types(torch.float32, weights.rule.dtype)
    for factor in (weights.left, weights.right):
        if factor is not None:
            dtype = torch.promote_types(dtype, factor.dtype)
    check_for_torch(weights.named("weights"))
    with without_autocast(weights.device):
        return kronecker_sum(weights, dtype)


def phm_linear(x: Tensor, weights: PHMWeights, *, impl: str = "auto") -> Tensor:
    """y = x H + b with H = sum_i A_i (x) (s_i t_i) (arXiv 2106.04647, equation 5).

    Args:
        x: (..., in), float32, bfloat16, float16 or float64, with any strides.
        weights: the projection in -> out, in any float dtypes.
        impl: "auto", "dense" (the only one that builds H), "factored", "cpu", "triton" or "cuda".

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: an explicit impl cannot serve the call, or an argument has no readable memory.
    """
    return route.run(LinearCall(x, weights), None, None, impl)


def compacter_adapter(
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights,
    *,
    activation: Activation = "gelu_new",
    residual: Residual = None,
    scale: float | Tensor = 1.0,
    norm: NormWeights | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """scale * up(act(down(x))) [+ residual], a Compacter adapter (arXiv 2106.04647, section 3).

    Args:
        x: (..., k), float32, bfloat16, float16 or float64, with any strides.
        down, up: the projections k -> d and d -> k, in any float dtypes.
        activation: a name in `compacter_kernels.activations.FUSED`, or a callable, not fused.
        residual: a tensor with the shape and dtype of x, or two of them. Adding x itself, as most
            adapters do, costs no second read. Another residual beside x costs "cpu" one more read,
            and the other impls an addition by torch.
        scale: a number, or a tensor of one number, which is differentiable.
        norm: a layer norm of the result, with weight and bias (k,) in x's dtype. "cpu" computes
            a frozen one in the same kernel; torch computes every other.
        out: a tensor like x for the result, if no gradient is recorded. It may overlap the inputs.
        impl: "auto", "dense", "factored", "cpu", "triton" or "cuda".

    Returns:
        (..., k), contiguous, in x's dtype; or `out`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: an explicit impl cannot serve the call, or an argument has no readable memory.
    """
    return route.run(_adapter_call(x, down, up, residual, scale, norm), activation, out, impl)


def explain(
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights | None = None,
    *,
    activation: Activation = "gelu_new",
    residual: Residual = None,
    scale: float | Tensor = 1.0,
    norm: NormWeights | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> dispatch.Explanation:
    """Tell which impl the call `compacter_adapter(x, down, up, ...)` takes, and why.

    Without `up` the call is `phm_linear(x, down)`. Raises whatever that call would raise.
    """
    if up is None:
        return route.explain(LinearCall(x, down), None, out, impl)
    return route.explain(_adapter_call(x, down, up, residual, scale, norm), activation, out, impl)


def _adapter_call(
    x: Tensor, down: PHMWeights, up: PHMWeights, residual: Residual, scale: float | Tensor, norm: NormWeights | None
) -> AdapterCall:
    """The call as every kernel takes it: scale is a number, and at most one residual is not x."""
    add_x = residual is x
    if add_x:
        residual = None
    elif residual is not None:
        if isinstance(residual, tuple):
            residual, add_x = _split_residuals(x, down, up, residual)
        else:
            _check_residual(residual, x, down, up)
    if not isinstance(scale, float):
        up, scale = _with_scale(up, scale)
    return AdapterCall(x, down, up, residual, add_x, scale, norm)


def _split_residuals(x: Tensor, down: PHMWeights, up: PHMWeights, pair: tuple[Tensor, ...]) -> tuple[Tensor, bool]:
    """The residual that is not x, and whether x is added too."""
    if len(pair) != 2:
        raise TypeError(f"residual must be a tensor or two of them, got a tuple of {len(pair)}")
    first, second = pair if pair[1] is x else pair[::-1]
    for residual in (first, second):
        _check_residual(residual, x, down, up)
    if second is x:
        return first, True
    check_for_torch([("residual", first), ("residual", second)])
    return first + second, False


def _check_residual(residual: Tensor, x: Tensor, down: PHMWeights, up: PHMWeights) -> None:
    """Raise for a wrong residual, or for an error of x, down and up, which comes first."""
    try:
        like = residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
    except (AttributeError, RuntimeError):  # not a tensor, or a nested tensor
        like = False
    if not like:
        adapter_problem(x, down, up, "identity")
        check_like(residual, "residual", x, x.shape)


def _with_scale(up: PHMWeights, scale: float | Tensor) -> tuple[PHMWeights, float]:
    """Return up and scale as a number. A tensor is multiplied into up, where autograd sees it."""
    if isinstance(scale, Tensor):
        check_weights(up, "up")
        check_tensor(scale, "scale")
        if scale.numel() != 1:
            raise ValueError(f"scale must be a number or a tensor of one number, got shape {tuple(scale.shape)}")
        if scale.device != up.device:
            raise ValueError(f"scale is on {scale.device}, up on {up.device}; move one of them")
        named = [*up.named("up"), ("scale", scale)]
        check_for_torch(named)
        try:
            return up.scaled(scale.reshape(())), 1.0
        except Exception as error:
            explain_failure(named, error)
            raise
    if not isinstance(scale, (float, int)):
        raise TypeError(f"scale must be a number or a tensor of one number, got {type(scale).__name__}")
    return up, float(scale)
