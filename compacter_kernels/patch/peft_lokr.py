"""The linear layers of LoKr in the library `peft`, 0.18 to 0.21, computed from their factors.

LoKr adds scaling * (w1 (x) w2) to the weight (out, in) of a layer. `peft` builds this matrix in
every forward, and its gradient in every backward.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from peft.tuners.lokr.layer import Linear, LoKrLayer
from torch import Tensor, nn

from compacter_kernels.impl.plain import autocasts
from compacter_kernels.patch.lokr import lokr_linear
from compacter_kernels.patch.methods import put, replaced_by_others

_METHODS = ("forward", "_get_delta_activations", "get_delta_weight")  # what `forward` below stands in for


def patch_module(module: nn.Module) -> tuple[bool, str] | None:
    """Whether the module is patched and how, or why not; None where there is nothing to report."""
    if not isinstance(module, LoKrLayer):
        return None
    kind = type(module)
    if not isinstance(module, Linear):
        return False, f"LoKr of a {type(module.get_base_layer()).__name__}: `peft` builds its matrix"
    if any(getattr(kind, name) is not getattr(Linear, name) for name in _METHODS):
        return False, f"{kind.__name__} has a forward of its own"
    if any(replaced_by_others(module, name) for name in _METHODS):
        return False, "its forward was replaced on the module"
    put(module, "forward", forward)
    return True, "LoKr from its factors"


def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Instead of LoKrLayer.forward, with the same random numbers in the same order."""
    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    result = layer.base_layer(x, *args, **kwargs)
    active = [name for name in layer.active_adapters if name in layer._available_adapters]
    for name in active:
        result = _with_adapter(layer, name, x, result, len(active) == 1)
    return result.to(x.dtype)  # type: ignore[no-any-return]


def _with_adapter(layer: Any, name: str, x: Tensor, result: Tensor, only: bool) -> Tensor:
    """The result with this adapter added, unless module dropout leaves it out."""
    probability, compiled = layer.module_dropout[name], torch.compiler.is_compiling()
    if not layer.training or (compiled and not probability):
        return _added(layer, name, x, result, only)
    keep = torch.rand(1) > probability
    if compiled:  # a compiled graph cannot branch on a random number
        return torch.where(keep.to(result.device), _added(layer, name, x, result, only), result)
    return _added(layer, name, x, result, only) if keep else result


def _added(layer: Any, name: str, x: Tensor, result: Tensor, only: bool) -> Tensor:
    """The result with this adapter added, in one pass where `peft` rounds the sum as one does.

    only: whether no other adapter is added, so that the sum gets x's dtype next.
    """
    w1, w2, scale = _matrices(layer, "w1", name), _matrices(layer, "w2", name), layer.scaling[name]
    dtype = reduce(torch.promote_types, [matrix.dtype for matrix in w1 + w2])
    if autocasts(x.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    working = torch.promote_types(x.dtype, dtype)
    rank_dropout = layer.rank_dropout[name] if layer.training else 0.0
    one_pass = working == x.dtype or (only and working != torch.float64)
    if one_pass and result.dtype == x.dtype and not rank_dropout:
        return lokr_linear(x, w1, w2, result, scale)
    y = lokr_linear(x.to(working), w1, w2, None, scale)
    if rank_dropout:
        kept = (torch.rand(y.shape[-1]) > rank_dropout).float().to(y.device)
        if layer.rank_dropout_scale[name]:
            kept /= kept.mean()
        y = y * kept
    return result + y.to(dtype)


def _matrices(layer: Any, side: str, name: str) -> list[Tensor]:
    """w1 or w2, or its two factors."""
    whole = getattr(layer, f"lokr_{side}")
    return [whole[name]] if name in whole else [getattr(layer, f"lokr_{side}_{part}")[name] for part in "ab"]
