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
from compacter_kernels.kronecker_map import kronecker_map
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
    for name in layer.active_adapters:
        if name in layer._available_adapters:
            result = _with_adapter(layer, name, x, result)
    return result.to(x.dtype)  # type: ignore[no-any-return]


def _with_adapter(layer: Any, name: str, x: Tensor, result: Tensor) -> Tensor:
    """The result with this adapter added, unless module dropout leaves it out."""
    probability, compiled = layer.module_dropout[name], torch.compiler.is_compiling()
    if not layer.training or (compiled and not probability):
        return result + _added(layer, name, x)
    keep = torch.rand(1) > probability
    if compiled:  # a compiled graph cannot branch on a random number
        return torch.where(keep.to(result.device), result + _added(layer, name, x), result)
    return result + _added(layer, name, x) if keep else result


def _added(layer: Any, name: str, x: Tensor) -> Tensor:
    """What the adapter adds, in the dtype in which `peft` computes it, rounded to that once."""
    rules, factors = _matrices(layer, "w1", name), _matrices(layer, "w2", name)
    dtype = reduce(torch.promote_types, [matrix.dtype for matrix in rules + factors])
    if autocasts(x.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    working = torch.promote_types(dtype, torch.float32)
    rules, factors = ([matrix.to(working) for matrix in side] for side in (rules, factors))
    y = kronecker_map(x, rules, factors, layer.scaling[name])
    if layer.training and layer.rank_dropout[name]:
        kept = (torch.rand(y.shape[-1]) > layer.rank_dropout[name]).float().to(y.device)
        if layer.rank_dropout_scale[name]:
            kept /= kept.mean()
        y = y * kept
    return y.to(dtype)


def _matrices(layer: Any, side: str, name: str) -> list[Tensor]:
    """The transposed w1 or w2, (1, columns, rows), or its two factors, for `kronecker_map`."""
    whole = getattr(layer, f"lokr_{side}")
    parts = [whole[name]] if name in whole else [getattr(layer, f"lokr_{side}_{part}")[name] for part in "ba"]
    return [part.mT[None] for part in parts]
