"""The dense bottleneck adapters that `from_dense` reads: two projections, or a module of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compacter_kernels.activations import FUSED
from compacter_kernels.input_statistics import InputStatistics
from compacter_kernels.nn.dense import read_projection


class Dense(NamedTuple):
    """One dense adapter: weights (out, in), as in nn.Linear, and options read from its module."""

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    options: dict[str, Any]

    @property
    def hidden_size(self) -> int:
        """The width of x."""
        return self.down.shape[1]

    @property
    def bottleneck(self) -> int:
        """The width of the bottleneck."""
        return self.down.shape[0]

    @property
    def parameters(self) -> int:
        """The number of parameters in weights and biases."""
        return sum(t.numel() for t in self[:4] if isinstance(t, Tensor))

    @property
    def has_bias(self) -> bool:
        """Whether at least one projection has a bias."""
        return self.down_bias is not None or self.up_bias is not None


def read_adapters(down: object, up: object) -> list[Dense]:
    """The adapters in the arguments of `from_dense`, all of one dtype and on one device."""
    if up is not None:
        return [_read_pair(down, up)]
    if isinstance(down, nn.Module) and not isinstance(down, (nn.Linear, nn.ModuleList)):
        return [_read_module(down)]
    if not isinstance(down, (list, tuple, nn.ModuleList)):
        raise TypeError(
            f"up is missing: down alone must be a module or a sequence of adapters, got {type(down).__name__}"
        )
    sources = []
    for i, item in enumerate(down):
        name = f"adapter {i}: "
        if isinstance(item, nn.Module):
            sources.append(_read_module(item, name))
        elif isinstance(item, (list, tuple)) and len(item) == 2:
            sources.append(_read_pair(item[0], item[1], name))
        else:
            raise TypeError(f"{name}must be a module or a pair (down, up), got {type(item).__name__}")
    if not sources:
        raise ValueError("down is an empty sequence; pass at least one adapter")
    first = sources[0].down
    for i, dense in enumerate(sources):
        if (dense.down.dtype, dense.down.device) != (first.dtype, first.device):
            raise ValueError(
                f"adapter {i} is {dense.down.dtype} on {dense.down.device}, the first {first.dtype} on {first.device}"
            )
    return sources


def _read_pair(down: object, up: object, name: str = "") -> Dense:
    """The adapter of projections k -> d and d -> k; a TypeError or ValueError names a wrong one."""
    dense = Dense(*read_projection(down, f"{name}down"), *read_projection(up, f"{name}up"), {})
    if dense.up.shape != dense.down.T.shape:
        shapes = f"{tuple(dense.up.shape)} for a down weight of {tuple(dense.down.shape)}"
        raise ValueError(f"{name}up must lead back to down's input: its weight (out, in) has shape {shapes}")
    for t, field in ((dense.down_bias, "down.bias"), (dense.up, "up.weight"), (dense.up_bias, "up.bias")):
        if t is not None and (t.dtype, t.device) != (dense.down.dtype, dense.down.device):
            expected = f"{dense.down.dtype} on {dense.down.device}"
            raise ValueError(f"{name}{field} is {t.dtype} on {t.device}, down.weight {expected}; convert one of them")
    return dense


def _read_module(module: nn.Module, name: str = "") -> Dense:
    """The adapter of a module with two nn.Linear, such as an `Adapter` of the library `adapters`.

    Its activation is the only submodule without parameters besides dropout, or None if there are
    more. A number `scaling` and the probability of a dropout become options. A module with other
    parameters (layer norms, gates, a learned scale) raises ValueError.
    """
    kind = f"{name}{type(module).__name__}"
    linears = {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear)}
    of_linears = {id(p) for m in linears.values() for p in m.parameters()}
    others = [path for path, p in module.named_parameters() if id(p) not in of_linears]
    if len(linears) != 2 or others:
        present = ", ".join([*linears, *others]) or "neither"
        raise ValueError(
            f"{kind} must have two nn.Linear and no other parameters, has {present}; pass down and up instead"
        )
    down, up = sorted(linears.values(), key=lambda linear: linear.out_features)
    options: dict[str, Any] = {}
    dropouts = {m.p for m in module.modules() if isinstance(m, nn.Dropout)}
    if len(dropouts) == 1:
        options["dropout"] = dropouts.pop()
    if isinstance(scaling := getattr(module, "scaling", None), (float, int)):
        options["scale"] = float(scaling)
    activations = list({id(m): m for m in _without_parameters(module)}.values())
    options["activation"] = _name_of(activations[0]) if len(activations) == 1 else None
    return _read_pair(down, up, name)._replace(options=options)


def read_inputs(inputs: Any, sources: list[Dense], several: bool) -> list[Tensor | None]:
    """The covariances of the inputs of down and up, adapter after adapter; None where not given.

    inputs: the argument of `from_dense`, of which `several` adapters have a sequence.
    """
    if inputs is None:
        return [None] * (2 * len(sources))
    if several and not (isinstance(inputs, (list, tuple)) and len(inputs) == len(sources)):
        raise ValueError(f"inputs must be a sequence with an entry for each of the {len(sources)} adapters")
    covariances: list[Tensor | None] = []
    for i, (entry, dense) in enumerate(zip(inputs if several else [inputs], sources, strict=True)):
        name = f"inputs[{i}]" if several else "inputs"
        pair = entry if isinstance(entry, (list, tuple)) else (entry, None)
        if len(pair) != 2 or not all(one is None or isinstance(one, InputStatistics) for one in pair):
            kind = type(entry).__name__
            raise TypeError(f"{name} must be InputStatistics, or a pair of them or None for down and up, got {kind}")
        for one, weight, field in zip(pair, (dense.down, dense.up), ("down", "up"), strict=True):
            covariances.append(None if one is None else one.of_width(weight.shape[1], f"{name} of {field}"))
    return covariances


def _without_parameters(module: nn.Module) -> list[nn.Module]:
    """The outermost submodules without parameters, except dropout and identity."""
    children = []
    for child in module.children():
        if next(child.parameters(), None) is not None:
            children += _without_parameters(child)
        elif not isinstance(child, (nn.Dropout, nn.Identity)):
            children.append(child)
    return children


def _name_of(activation: Callable[[Tensor], Tensor]) -> str | Callable[[Tensor], Tensor]:
    """The name of the fused activation with the same values, or the callable itself."""
    x = torch.linspace(-8, 8, 257, dtype=torch.float64)
    with torch.no_grad():
        y = activation(x.clone())
        same = (name for name, entry in FUSED.items() if torch.allclose(y, entry.function(x), rtol=1e-9, atol=1e-9))
        return next(same, activation)
