"""BatchSplit and Average of the library `adapters`, in one call of a bank where they are simple.

The methods of the library run the adapters one after the other. Here all adapters of a layer are
one call, if they are single adapters of one kind, size and activation. Where anything else takes
part, such as another composition, a gate or dropout, the methods of the library run.
"""

from __future__ import annotations

from typing import Any

import torch
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Adapter, ParallelAdapter
from torch import Tensor

from compacter_kernels.functional import compacter_adapter_bank
from compacter_kernels.patch.adapters_forward import (
    activation_of,
    can_fuse,
    original,
    output_gating,
    parts,
    runs_bottleneck,
    weights,
)
from compacter_kernels.private import children
from compacter_kernels.weights import LinearWeights, PHMWeights


def compose_batch_split(layer: Any, adapter_setup: Any, state: Any, lvl: int = 0) -> Any:
    """Instead of compose_batch_split: each sample has the adapter of its part of the batch."""
    rows, sizes = state.hidden_states.shape[0], adapter_setup.batch_sizes
    adapters = _alike(layer, adapter_setup)
    if adapters is None or sum(sizes) != rows or state.bottleneck_up is not None:
        return original(BottleneckLayer, "compose_batch_split")(layer, adapter_setup, state, lvl)
    state = layer.pre_block(adapter_setup, state)
    x, residual = state.hidden_states, state.adapter_residual
    route = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)], device=x.device)
    y = _bank(adapters, x, None if isinstance(adapters[0], ParallelAdapter) else residual, route=route)
    return state._replace(hidden_states=y, last=adapter_setup.children[-1])


def compose_average(layer: Any, adapter_setup: Any, state: Any, lvl: int = 0) -> Any:
    """Instead of compose_average, which gives the mean over k of w_k (up_k + residual)."""
    adapters = _alike(layer, adapter_setup)
    if adapters is None or state.bottleneck_up is not None:
        return original(BottleneckLayer, "compose_average")(layer, adapter_setup, state, lvl)
    state = layer.pre_block(adapter_setup, state)
    x = state.hidden_states
    shares = torch.tensor(adapter_setup.weights, device=x.device) / len(adapters)
    y = _bank(adapters, x, None, mix=shares)
    if not isinstance(adapters[0], ParallelAdapter):
        y = y + shares.sum().to(y.dtype) * state.adapter_residual
    return state._replace(hidden_states=y, last=adapter_setup.children[-1])


def _alike(layer: Any, adapter_setup: Any) -> list[Any] | None:
    """The adapters of a composition, if one call of a bank computes them; else None."""
    modules, names = children(layer), adapter_setup.children
    if len(children(modules["adapter_fusion_layer"])) or output_gating():
        return None
    held = children(modules["adapters"])
    if not all(type(name) is str and name in held for name in names):
        return None
    adapters = [held[name] for name in names]
    kinds = {_kind(adapter) for adapter in adapters}
    return adapters if len(kinds) == 1 and None not in kinds else None


def _kind(adapter: Any) -> Any:
    """Equal for adapters that one bank may hold; None for one with more than its projections."""
    modules, scale = children(adapter), adapter.scaling
    dropout = modules["dropout"]
    if type(adapter) not in (Adapter, ParallelAdapter) or not runs_bottleneck(adapter):
        return None
    if adapter.add_layer_norm_before or adapter.add_layer_norm_after or adapter.use_gating or "DropPath" in modules:
        return None
    if (dropout.p > 0 and dropout.training) or (isinstance(scale, Tensor) and scale.numel() != 1):
        return None
    if not can_fuse(adapter, adapter, dropout):
        return None
    activation = activation_of(parts(adapter)[0][-1])
    if not isinstance(activation, str):
        return None
    shapes = [
        (type(side), *((None if t is None else (t.shape, t.dtype, t.device)) for t in side)) for side in _sides(adapter)
    ]
    return type(adapter), activation, *shapes


def _sides(adapter: Any) -> tuple[Any, Any]:
    """The weights of both projections."""
    layers, up = parts(adapter)
    return weights(layers[-2]), weights(up)


def _bank(adapters: list[Any], x: Tensor, residual: Tensor | None, **choice: Any) -> Tensor:
    """The adapters of the rows of x, or their weighted sum."""
    down, up = ([_sides(adapter)[side] for adapter in adapters] for side in (0, 1))
    scales = [adapter.scaling for adapter in adapters]
    scale: Any = scales[0]
    if isinstance(scale, Tensor) or any(isinstance(other, Tensor) or other != scale for other in scales):
        scale = torch.stack([torch.as_tensor(s, dtype=x.dtype, device=x.device).reshape(()) for s in scales])
    activation = activation_of(parts(adapters[0])[0][-1])
    stacked = [_stacked(side) for side in (down, up)]
    return compacter_adapter_bank(x, *stacked, activation=activation, residual=residual, scale=scale, **choice)


def _stacked(sides: list[Any]) -> Any:
    """The weights of a bank. Dense ones keep the layout of nn.Linear, which is the fastest copy."""
    if isinstance(sides[0], LinearWeights):
        bias = None if sides[0].bias is None else torch.stack([side.bias for side in sides])
        return LinearWeights(torch.stack([side.weight.mT for side in sides]).mT, bias)
    stacked: list[Any] = [None if ts[0] is None else torch.stack(ts) for ts in zip(*sides, strict=True)]
    return PHMWeights(*stacked)
