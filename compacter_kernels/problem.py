"""The checked sizes, dtypes and device of a call. A problem is hashable, and is planned once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compacter_kernels.activations import Activation, resolve
from compacter_kernels.weights import LinearWeights, NormWeights, PHMWeights, Weights

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Projection(NamedTuple):
    """One projection. rank: None if W is whole; dtypes: those of the weights, in their order.

    A dense projection has no terms, and one chunk on either side.
    """

    terms: int
    n_in: int
    n_out: int
    rank: int | None
    in_features: int
    out_features: int
    dtypes: tuple[torch.dtype | None, ...]

    @property
    def phm_dim(self) -> int | None:
        """The phm_dim of a PHM projection, else None."""
        return self.terms if self.terms == self.n_in == self.n_out else None


class Bank(NamedTuple):
    """How many adapters a bank has, how they are chosen, and which rules belong to all of them."""

    adapters: int
    mixed: bool
    shared_rules: tuple[bool, ...]


class Problem(NamedTuple):
    """A "linear" with one projection and no activation, or an adapter with down and up.

    The adapter is an "adapter" of Kronecker sums or a "bottleneck" of dense projections. base:
    whether a tensor is added to a linear.
    """

    operation: str
    device: torch.device
    dtype: torch.dtype
    projections: tuple[Projection, ...]
    activation: Activation | None
    bank: Bank | None = None
    base: bool = False


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
    _check_layout(value, name)
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")


def _check_layout(value: Tensor, name: str) -> None:
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")


def check_weights(weights: PHMWeights, name: str, adapters: int | None = None) -> Projection:
    """The sizes of these weights; a TypeError or ValueError names a field that does not fit.

    adapters: the size of the bank that they belong to; None for the weights of one projection.
    """
    if not isinstance(weights, PHMWeights):
        raise TypeError(
            f"{name} must be PHMWeights(rule, left, right, bias), as PHMLinear.weights() gives, "
            f"got {type(weights).__name__}"
        )
    rule, left, right, _ = weights
    bank, stacked = ((), 0) if adapters is None else ((adapters,), 1)
    check_tensor(left, f"{name}.left", 3 + stacked)
    shared = stacked and isinstance(rule, Tensor) and rule.ndim == 3
    check_tensor(rule, f"{name}.rule", 3 + stacked - shared)
    terms, n_in, n_out = rule.shape[-3:]
    if 0 in rule.shape or (stacked and not shared and rule.shape[0] != adapters):
        wanted = (*bank, "terms", "n_in", "n_out")
        raise ValueError(f"{name}.rule must have shape ({', '.join(map(str, wanted))}), got {tuple(rule.shape)}")
    _check_shape(left, f"{name}.left", (*bank, terms, None, None), (*bank, terms, f"in/{n_in}", "rank"))
    rank = None
    if right is not None:
        check_tensor(right, f"{name}.right", 3 + stacked)
        rank = left.shape[-1]
        _check_shape(right, f"{name}.right", (*bank, terms, rank, None), (*bank, terms, rank, f"out/{n_out}"))
    width, last = n_in * left.shape[-2], left if right is None else right
    return _projection(weights, name, bank, (terms, n_in, n_out, rank, width, n_out * last.shape[-1]))


def _check_dense(weights: LinearWeights, name: str, adapters: int | None) -> Projection:
    """The sizes of a dense projection."""
    bank = () if adapters is None else (adapters,)
    check_tensor(weights.weight, f"{name}.weight", 2 + len(bank))
    _check_shape(weights.weight, f"{name}.weight", (*bank, None, None), (*bank, "in", "out"))
    return _projection(weights, name, bank, (0, 1, 1, None, *weights.weight.shape[-2:]))


def _check_shape(tensor: Tensor, name: str, sizes: tuple[int | None, ...], words: tuple[object, ...]) -> None:
    """Raise unless the tensor has these sizes, where None is any but 0, said in these words."""
    if any(got == 0 or (wanted is not None and got != wanted) for got, wanted in zip(tensor.shape, sizes, strict=True)):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, words))}), got {tuple(tensor.shape)}")


def _projection(
    weights: Weights, name: str, bank: tuple[int, ...], sizes: tuple[int, int, int, int | None, int, int]
) -> Projection:
    """The projection of weights whose factors are checked.

    It takes no property of a NamedTuple, since torch.compile of torch 2.6 cannot trace one.
    """
    if weights.bias is not None:
        check_tensor(weights.bias, f"{name}.bias", 1 + len(bank))
        if weights.bias.shape != (*bank, sizes[-1]):
            shape = ", ".join(map(str, (*bank, sizes[-1])))
            hint = "; the weight is (in, out), linear.weight.t()" if isinstance(weights, LinearWeights) else ""
            raise ValueError(f"{name}.bias must have shape ({shape},), got {tuple(weights.bias.shape)}{hint}")
    (first, tensor), *others = weights.named(name)
    for other, each in others:
        if each.device != tensor.device:
            raise ValueError(f"{other} is on {each.device}, {first} on {tensor.device}; move one of them")
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in weights)
    return Projection(*sizes, dtypes)


def _check_input(x: Tensor, projection: Projection, weights: Weights, name: str) -> None:
    check_tensor(x, "x")
    width = projection.in_features
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"x must have shape (..., {width}), the input width of {name}, got {tuple(x.shape)}")
    if weights[0].device != x.device:
        raise ValueError(f"x is on {x.device}, {name} on {weights[0].device}; move one of them")


def linear_problem(x: Tensor, weights: PHMWeights, base: Tensor | None = None) -> Problem:
    """The problem of `phm_linear(x, weights)`; a TypeError or ValueError names a wrong argument."""
    projection = check_weights(weights, "weights")
    _check_input(x, projection, weights, "weights")
    if base is not None:
        check_like(base, "base", x, (*x.shape[:-1], projection.out_features))
    return Problem("linear", x.device, x.dtype, (projection,), None, base=base is not None)


def adapter_problem(
    x: Tensor,
    down: Weights,
    up: Weights,
    activation: str | Callable[[Tensor], Tensor],
    adapters: int | None = None,
    mixed: bool = False,
) -> Problem:
    """The problem of an adapter, or of a bank of `adapters`; raises like `linear_problem`."""
    dense = isinstance(down, LinearWeights)
    if dense is not isinstance(up, LinearWeights) and isinstance(up, (PHMWeights, LinearWeights)):
        raise TypeError(f"down and up must be of one class, got {type(down).__name__} and {type(up).__name__}")
    check = _check_dense if dense else check_weights
    first, second = check(down, "down", adapters), check(up, "up", adapters)  # type: ignore[arg-type]
    _check_input(x, first, down, "down")
    if second.in_features != first.out_features:
        raise ValueError(f"up takes width {second.in_features}, but down gives width {first.out_features}")
    if second.out_features != first.in_features:
        raise ValueError(f"up gives width {second.out_features}, but x has width {first.in_features}")
    if up[0].device != x.device:
        raise ValueError(f"x is on {x.device}, up on {up[0].device}; move one of them")
    bank = None
    if adapters is not None:
        bank = Bank(adapters, mixed, tuple(not dense and w[0].ndim == 3 for w in (down, up)))
    return Problem("bottleneck" if dense else "adapter", x.device, x.dtype, (first, second), resolve(activation), bank)


def check_choice(x: Tensor, route: object, mix: object, adapters: int) -> None:
    """Raise unless exactly one of route and mix is given, and fits the checked x and a bank."""
    if (route is None) == (mix is None):
        raise ValueError("pass either route, an adapter for each row, or mix, weights of all adapters")
    choice, name = (route, "route") if mix is None else (mix, "mix")
    if not isinstance(choice, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(choice).__name__}")
    if mix is None:
        if choice.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"route must be int64 or int32, got {dtype_name(choice.dtype)}")
        _check_layout(choice, "route")
        leading, wanted = choice.shape, ""
    else:
        check_tensor(choice, "mix")
        leading, wanted = choice.shape[:-1], f", then {adapters} for the adapters"
    rows = x.shape[:-1]
    if leading != rows[: len(leading)] or (mix is not None and (not choice.ndim or choice.shape[-1] != adapters)):
        raise ValueError(f"{name} must have the first sizes of {tuple(rows)}{wanted}, got {tuple(choice.shape)}")
    if choice.device != x.device:
        raise ValueError(f"{name} is on {choice.device}, x on {x.device}; move one of them")


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
