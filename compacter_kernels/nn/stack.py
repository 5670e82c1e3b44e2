"""Several adapters of the same options, computed by one call of a bank."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compacter_kernels.functional import compacter_adapter_bank
from compacter_kernels.nn.adapter_base import AdapterBase
from compacter_kernels.nn.borrower import LayerNorm
from compacter_kernels.private import children, runs
from compacter_kernels.weights import Weights

NORMS = ("ln_before", "ln_after")
# What may differ between adapters of one stack: it has no effect on what they compute.
_INITIAL = (
    "init",
    "init_weights",
    "phm_init_range",
    "phm_c_init",
    "reduction_factor",
    "shared_phm_rule",
    "phm_rule",
    "device",
)


class Norms(NamedTuple):
    """The layer norms of E adapters: weight and bias (E, k)."""

    weight: Tensor
    bias: Tensor
    eps: float

    def of_rows(self, x: Tensor, route: Tensor) -> Tensor:
        """x with the norm of each row's adapter, in x's dtype. Rows without one get any norm."""
        y = F.layer_norm(x.to(self.weight.dtype), x.shape[-1:], eps=self.eps)
        own = route.clamp(min=0)
        weight, bias = (along(t[own], x) for t in (self.weight, self.bias))
        return (y * weight + bias).to(x.dtype)


class Stack(NamedTuple):
    """The weights of E adapters, each with a leading dimension E. like: an adapter, for options."""

    like: AdapterBase
    down: Weights
    up: Weights
    scale: float | Tensor
    norm_before: Norms | None
    norm_after: Norms | None
    training: bool

    def __call__(self, x: Tensor, residual: Tensor | None, route: Tensor | None, mix: Tensor | None) -> Tensor:
        """The adapter of each row, or the weighted sum of all, plus the residual.

        x, residual, route and mix are as `compacter_adapter_bank` takes them, but the residual may
        have another dtype. Rows of the route -1 get the residual as it is, or 0.

        ValueError: mix for adapters with layer norms, which no sum of adapters has.
        """
        like, norm_after = self.like, self.norm_after
        if mix is not None:
            check_mixable(like)
        h = x if self.norm_before is None else self.norm_before.of_rows(x, route)  # type: ignore[arg-type]
        late = (like.dropout > 0 and self.training) or norm_after is not None
        late |= isinstance(residual, Tensor) and residual.dtype != h.dtype
        y = compacter_adapter_bank(
            h,
            self.down,
            self.up,
            route=route,
            mix=mix,
            activation=like.activation,
            residual=None if late else residual,
            scale=self.scale,
            impl=like.impl,
        )
        if not late:
            return y
        y = F.dropout(y, like.dropout, self.training)
        if norm_after is not None and not like.residual_before_ln:
            y = norm_after.of_rows(y, route)  # type: ignore[arg-type]
        if residual is not None:
            y = y + residual
        if norm_after is not None and like.residual_before_ln:
            y = norm_after.of_rows(y, route)  # type: ignore[arg-type]
        if route is None:
            return y
        return torch.where(along(route == -1, y, 0), torch.zeros_like(y) if residual is None else residual, y)


def check_mixable(adapter: Any) -> None:
    """Raise ValueError for an adapter with layer norms, which no sum of adapters has."""
    for name in NORMS:
        if getattr(adapter, name):
            raise ValueError(
                f"{name}=True: adapters with a layer norm can be routed, but not mixed; those of embeddings have one"
            )


def along(of_rows: Tensor, x: Tensor, last: int = 1) -> Tensor:
    """A tensor of the first sizes of x, and its last ones, broadcast over the sizes between."""
    rows, own = of_rows.shape[: of_rows.ndim - last], of_rows.shape[of_rows.ndim - last :]
    return of_rows.reshape(*rows, *[1] * (x.ndim - of_rows.ndim - 1 + last), *(own or (1,)))


def options_of(adapter: AdapterBase) -> dict[str, Any]:
    """The options that adapters of one stack have in common, by name."""
    down: Any = adapter.down
    values = {
        **vars(down),
        **vars(adapter),
        "phm_bias": down.weights().bias is not None,
        "dtype": first_parameter(adapter).dtype,
    }
    names = [name for name in inspect.signature(type(adapter)).parameters if name not in _INITIAL]
    return {"kind": type(adapter), **{name: values[name] for name in (*names, "bottleneck")}}


def first_parameter(adapter: AdapterBase) -> Tensor:
    """A parameter of the adapter, which has its dtype and device."""
    down: Any = adapter.down
    return down._weight(down.factor_names()[0])  # type: ignore[no-any-return]


def stack(adapters: Sequence[AdapterBase]) -> Stack:
    """The weights of adapters whose `options_of` are equal, as new tensors, differentiable."""

    def read(names: tuple[str, ...]) -> Any:
        return _stacked([_read(adapter, names) for adapter in adapters], names[-1].startswith("phm_rule"))

    return packed(adapters[0], read, adapters[0].training)


def packed(like: AdapterBase, read: Callable[[tuple[str, ...]], Any], training: bool) -> Stack:
    """The stack of the parameters that `read` gives by their names, such as ("down", "W_left")."""
    down: Any = like.down
    up: Any = like.up
    before, after = [
        None if norm is None else Norms(read((name, "weight")), read((name, "bias")), norm.eps)
        for name, norm in (("norm_before", like.norm_before), ("norm_after", like.norm_after))
    ]
    scale: Any = read(("scaling",)) if like.scale == "learned" else like.scale
    sides = [p.packed(lambda name, side=side: read((side, name))) for side, p in (("down", down), ("up", up))]
    return Stack(like, sides[0], sides[1], scale, before, after, training)


def _read(adapter: Any, names: tuple[str, ...]) -> Any:
    *path, name = names
    for part in path:
        adapter = children(adapter)[part]
    return adapter._weight(name)


def _stacked(tensors: list[Any], is_rule: bool) -> Any:
    """(E, ...) of E tensors; for a rule that is the same one for all that itself; or None."""
    if tensors[0] is None or (is_rule and len(tensors) > 1 and all(t is tensors[0] for t in tensors)):
        return tensors[0]
    return torch.stack(tensors)


def stackable(adapter: Any) -> bool:
    """Whether a call of this adapter does what its options say: no part is replaced or hooked."""
    if not isinstance(adapter, AdapterBase) or not runs(AdapterBase.forward, adapter):
        return False
    parts: Any = children(adapter)
    norms = [norm for norm in (adapter.norm_before, adapter.norm_after) if norm is not None]
    return runs(adapter._projection.forward, parts["down"], parts["up"]) and runs(LayerNorm.forward, *norms)
