"""The public functions. Each packs its arguments into one call, which `call_path` takes on."""

from __future__ import annotations

import torch
from torch import Tensor

from compacter_kernels import dispatch
from compacter_kernels.arguments import Activation, Residual, adapter_call, bank_call, linear_call
from compacter_kernels.call_path import explain as _explain, run as _run
from compacter_kernels.calls import Call, LinearCall
from compacter_kernels.impl.memory import check_for_torch
from compacter_kernels.impl.plain import without_autocast
from compacter_kernels.problem import check_weights
from compacter_kernels.weights import LinearWeights, NormWeights, PHMWeights, Weights, kronecker_sum


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
    return _run(LinearCall(x, weights), None, None, impl)


def kronecker_linear(
    x: Tensor, weights: PHMWeights, base: Tensor | None = None, scale: float | Tensor = 1.0, *, impl: str = "auto"
) -> Tensor:
    """base + scale * (x H + b) with a sum of Kronecker products H = sum_i A_i (x) (s_i t_i).

    H may have any shape: LoKr (arXiv 2309.14859), KronA (arXiv 2212.10650) and PHM projections are
    such sums.

    Args:
        x: (..., in), float32, bfloat16, float16 or float64, with any strides.
        weights: rule (terms, n_in, n_out), left (terms, in/n_in, r), right (terms, r, out/n_out),
            or a whole second factor as left and no right; in any float dtypes.
        base: (..., out) in x's dtype, or None. Its gradient is that of the result.
        scale: a number, or a tensor of one number, which is differentiable.
        impl: "auto", "dense", "factored", "cpu", "triton" or "cuda".

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: an explicit impl cannot serve the call, or an argument has no readable memory.
    """
    return _run(linear_call(x, weights, base, scale), None, None, impl)


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
    return _run(adapter_call(x, down, up, residual, scale, norm), activation, out, impl)


def bottleneck_adapter(
    x: Tensor,
    down: LinearWeights,
    up: LinearWeights,
    *,
    activation: Activation = "silu",
    residual: Residual = None,
    scale: float | Tensor = 1.0,
    norm: NormWeights | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """scale * up(act(down(x))) [+ residual], a plain bottleneck adapter (arXiv 1902.00751).

    Args:
        x: (..., k), float32, bfloat16, float16 or float64, with any strides.
        down, up: the dense projections k -> d and d -> k, in any float dtypes. Weights of the
            layout of nn.Linear, `LinearWeights(linear.weight.t(), linear.bias)`, are not copied.
        activation, residual, scale, norm, out, impl: see `compacter_adapter`.

    Returns:
        (..., k), contiguous, in x's dtype; or `out`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: an explicit impl cannot serve the call, or an argument has no readable memory.
    """
    for weights, name in ((down, "down"), (up, "up")):
        if not isinstance(weights, LinearWeights):
            raise TypeError(
                f"{name} must be LinearWeights(linear.weight.t(), linear.bias), got {type(weights).__name__}"
            )
    return _run(adapter_call(x, down, up, residual, scale, norm), activation, out, impl)


def compacter_adapter_bank(
    x: Tensor,
    down: Weights,
    up: Weights,
    *,
    route: Tensor | None = None,
    mix: Tensor | None = None,
    activation: Activation = "gelu_new",
    residual: Residual = None,
    scale: float | Tensor = 1.0,
    norm: NormWeights | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The adapter of each row, or a weighted sum of all adapters, from a bank of E adapters.

        route:  scale * up_e(act(down_e(x))) [+ residual], with e the adapter of the row
        mix:    sum_e w_e scale * up_e(act(down_e(x))) [+ residual], with the w_e of the row

    Args:
        x: (..., k), float32, bfloat16, float16 or float64, with any strides.
        down, up: PHMWeights or LinearWeights k -> d and d -> k, whose tensors have a leading
            dimension E. A rule without it belongs to all adapters.
        route: int64 or int32; its shape is the first sizes of x, as (B,) or (B, S) for x (B, S, k).
            -1 stands for no adapter: the row gets its residual alone. An adapter without a row
            gets gradients of 0.
        mix: (..., E) in any float dtype, after the first sizes of x, as (E,), (B, E) or (B, S, E);
            differentiable.
        scale: a number, or a tensor of one number or of E, which is differentiable.
        activation, residual, norm, out, impl: see `compacter_adapter`. torch computes the norm.

    Returns:
        (..., k), contiguous, in x's dtype; or `out`. On a GPU, where nothing waits for the numbers
        in route, a row whose adapter does not exist is NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a number in route is not an adapter (on the CPU).
        RuntimeError: an explicit impl cannot serve the call, or an argument has no readable memory.
    """
    return _run(bank_call(x, down, up, route, mix, residual, scale, norm), activation, out, impl)


def explain(
    x: Tensor,
    down: Weights,
    up: Weights | None = None,
    *,
    route: Tensor | None = None,
    mix: Tensor | None = None,
    activation: Activation = "gelu_new",
    residual: Residual = None,
    scale: float | Tensor = 1.0,
    norm: NormWeights | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> dispatch.Explanation:
    """Tell which impl the call of an adapter with these arguments takes, and why.

        print(ck.explain(x, adapter.down.weights(), adapter.up.weights()))

    The arguments are those of `compacter_adapter` or `bottleneck_adapter`. With route or mix they
    are those of `compacter_adapter_bank`, and without `up` those of `phm_linear`.

    Returns:
        `impl`, the name; `reason`, why it was chosen; `others`, the reason against each other impl.

    Raises:
        TypeError, ValueError, RuntimeError: as that call would.
    """
    call: Call
    if up is None:
        call = LinearCall(x, down)  # type: ignore[arg-type]
    elif route is None and mix is None:
        call = adapter_call(x, down, up, residual, scale, norm)
    else:
        call = bank_call(x, down, up, route, mix, residual, scale, norm)
    return _explain(call, None if up is None else activation, out, impl)
