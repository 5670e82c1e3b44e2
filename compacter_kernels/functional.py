"""The public functions: each makes one value of its call, which then goes down through `route` to a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compacter_kernels import dispatch, route
from compacter_kernels.calls import AdapterCall, LinearCall, explain_failure
from compacter_kernels.impl.memory import check_for_torch
from compacter_kernels.impl.precision import without_autocast
from compacter_kernels.problem import adapter_problem, check_like, check_scale, check_weights
from compacter_kernels.weights import NormWeights, PHMWeights, kronecker_sum

Activation = str | Callable[[Tensor], Tensor]


def phm_matrix(weights: PHMWeights) -> Tensor:
    """The matrix H = sum_i A_i (x) (s_i t_i) of a projection, y = x H + b (arXiv 2106.04647, equation 5).

    H[p * in/n + u, q * out/n + v] = sum_i rule[i, p, q] (left_i right_i)[u, v].

    Returns:
        (in, out), contiguous, differentiable; in the widest dtype of the weights and never below float32, since most
        entries are subnormal in float16 at the paper's initialisation.

    Raises:
        TypeError, ValueError: weights that do not fit together; the message names the field.
        RuntimeError: weights whose memory has been freed.
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
    """y = x H + b with H = sum_i A_i (x) (s_i t_i) (arXiv 2106.04647, equation 5); H is built by impl="dense" only.

    Args:
        x: (..., in), float32, bfloat16, float16 or float64; any strides.
        weights: the projection in -> out, in any float dtypes.
        impl: "auto", "dense", "factored", "cpu", "triton" or "cuda".

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit impl that cannot serve this call; an argument without memory that can be read.
    """
    return route.run(LinearCall(x, weights), None, None, impl)


def compacter_adapter(
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights,
    *,
    activation: Activation = "gelu_new",
    residual: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | Tensor = 1.0,
    norm: NormWeights | None = None,
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
        norm: a layer norm behind all this, with weight and bias (k,) in x's dtype. Where it is frozen, "cpu" computes
            it in the same kernel; else torch does.
        out: where to write, like x; only where no gradient is recorded. It may overlap the inputs.
        impl: "auto", "dense", "factored", "cpu", "triton" or "cuda".

    Returns:
        (..., k), contiguous, in x's dtype; or `out`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit impl that cannot serve this call; an argument without memory that can be read.
    """
    return route.run(_adapter_call(x, down, up, residual, scale, norm), activation, out, impl)


def explain(
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights | None = None,
    *,
    activation: Activation = "gelu_new",
    residual: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | Tensor = 1.0,
    norm: NormWeights | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> dispatch.Explanation:
    """The impl that `compacter_adapter(x, down, up, ...)`, or without `up` `phm_linear(x, down)`, takes, and why.

    Takes the arguments of that call and raises what it would raise.
    """
    if up is None:
        return route.explain(LinearCall(x, down), None, out, impl)
    return route.explain(_adapter_call(x, down, up, residual, scale, norm), activation, out, impl)


def _adapter_call(
    x: Tensor,
    down: PHMWeights,
    up: PHMWeights,
    residual: Tensor | tuple[Tensor, Tensor] | None,
    scale: float | Tensor,
    norm: NormWeights | None,
) -> AdapterCall:
    """The call as every kernel takes it: a number for scale, x and at most one other residual."""
    add_x = residual is x
    if add_x:
        residual = None
    elif residual is not None:
        if isinstance(residual, tuple):
            residual, add_x = _of_two(x, down, up, residual)
        elif not _alike(residual, x):
            _complain(residual, x, down, up)
    if not isinstance(scale, float):
        up, scale = _with_scale(up, scale)
    return AdapterCall(x, down, up, residual, add_x, scale, norm)


def _of_two(x: Tensor, down: PHMWeights, up: PHMWeights, pair: tuple[Tensor, ...]) -> tuple[Tensor, bool]:
    """The residual besides x, and whether x is added too."""
    if len(pair) != 2:
        raise TypeError(f"residual must be a tensor or two of them, got a tuple of {len(pair)}")
    one, other = pair if pair[1] is x else pair[::-1]
    for tensor in (one, other):
        if not _alike(tensor, x):
            _complain(tensor, x, down, up)
    if other is x:
        return one, True
    check_for_torch([("residual", one), ("residual", other)])
    return one + other, False


def _alike(residual: Tensor, x: Tensor) -> bool:
    try:
        return residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
    except (AttributeError, RuntimeError):  # no tensor, or a nested one
        return False


def _complain(residual: Tensor, x: Tensor, down: PHMWeights, up: PHMWeights) -> None:
    """Raise for a residual that is not like x; but first for what is wrong with the others."""
    adapter_problem(x, down, up, "identity")
    check_like(residual, "residual", x, x.shape)


def _with_scale(up: PHMWeights, scale: float | Tensor) -> tuple[PHMWeights, float]:
    """A number as it is; a tensor as weights of up, where autograd differentiates it."""
    if isinstance(scale, Tensor):
        check_weights(up, "up")
        check_scale(scale, up)
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
