"""The forward of the PHM layers and of the adapters of the library `adapters`, in the kernels.

`projection` stands in for PHMLayer.forward, and `bottleneck` for Adapter.forward and
ParallelAdapter.forward, all of version 1.3.0.
"""

from __future__ import annotations

from typing import Any

import torch
from adapters.context import ForwardContext
from adapters.methods.modeling import Adapter, ParallelAdapter, PHMLayer
from torch import Tensor, nn

from compacter_kernels.functional import compacter_adapter, phm_linear
from compacter_kernels.patch import phm_modules
from compacter_kernels.patch.activation_names import fused_name
from compacter_kernels.patch.methods import runs_more
from compacter_kernels.private import children
from compacter_kernels.weights import PHMWeights

# The methods of the library that `patch()` has replaced on their classes.
originals: dict[tuple[type, str], Any] = {}


def original(kind: type, name: str) -> Any:
    """The method of that class, as it is without this package."""
    for base in kind.__mro__:
        if name in vars(base):
            return originals.get((base, name), vars(base)[name])
    raise AttributeError(f"{kind.__name__} has no {name}")


def is_phm_layer(module: Any) -> bool:
    """Whether this is a PHMLayer of `adapters` that has the forward of that class."""
    kind = type(module)
    if kind is PHMLayer:
        return True
    return isinstance(module, PHMLayer) and original(kind, "forward") is original(PHMLayer, "forward")


def weights(layer: Any) -> PHMWeights:
    """The weights of a PHMLayer; the model's forward puts shared ones into the ForwardContext."""
    if not (layer.shared_phm_rule or layer.shared_W_phm):
        return phm_modules.weights(layer, layer, layer)
    shared = ForwardContext.get_contexts()[-1].shared_parameters[layer.name]
    rules = shared if layer.shared_phm_rule else layer
    if layer.shared_W_phm:
        return phm_modules.weights(layer, rules, shared, f"W_{layer.position}")
    return phm_modules.weights(layer, rules, layer)


def projection(layer: nn.Module, x: Tensor) -> Tensor:
    """Instead of PHMLayer.forward."""
    return phm_linear(x, weights(layer))


def parts(adapter: Any) -> tuple[tuple[Any, ...], Any]:
    """The layers of adapter_down, whose last one is the activation, and adapter_up."""
    modules = children(adapter)
    return tuple(children(modules["adapter_down"]).values()), modules["adapter_up"]


def _inner(activation: Any) -> Any:
    """The function or module that the activation calls; None for a module of another kind."""
    return children(activation).get("f") or vars(activation).get("f")


def activation_of(layer: Any) -> Any:
    """The activation as `compacter_adapter` takes it: a fused name, or the module itself."""
    return fused_name(_inner(layer)) or layer


def can_fuse(adapter: Any, *others: nn.Module) -> bool:
    """Whether the kernel may stand in for both projections, the activation and the others."""
    layers, up = parts(adapter)
    if len(layers) != 2 + adapter.add_layer_norm_before or not (is_phm_layer(layers[-2]) and is_phm_layer(up)):
        return False
    inner = _inner(layers[-1])
    if isinstance(inner, nn.Module):
        others = (*others, inner)
    return not runs_more(children(adapter)["adapter_down"], *layers[-2:], up, *others)


def bottleneck(
    adapter: Any, x: Tensor, residual_input: Tensor | None, output_gating: bool = False, fused: str | None = None
) -> Any:
    """Instead of Adapter.forward and ParallelAdapter.forward.

    fused: None: as the library, which returns output, down, up and, with output_gating, the gate.
    "output": output, None, None. "up": output, None, up, as AdapterFusion needs them.
    """
    parallel = isinstance(adapter, ParallelAdapter)
    if fused is None or residual_input is None or not can_fuse(adapter):
        library = original(ParallelAdapter if parallel else Adapter, "forward")  # that of a subclass may call this one
        return library(adapter, x, residual_input, output_gating)
    drops_path = not parallel and "DropPath" in children(adapter)  # ParallelAdapter does not call the one that it has
    residual = None if parallel else residual_input
    scale, channels = adapter.scaling, None
    if isinstance(scale, Tensor) and scale.numel() != 1:
        scale, channels = 1.0, scale
    layers, up_layer = parts(adapter)
    dropout = children(adapter)["dropout"]
    h = _in_dtype_of(layers[0], x) if adapter.add_layer_norm_before else x
    inside = (  # whether the kernel adds the residual too, since nothing lies between
        fused == "output"
        and residual is not None
        and channels is None
        and not adapter.use_gating
        and not (dropout.training and dropout.p > 0)
        and not runs_more(dropout)
        and not (drops_path and adapter.DropPath.training)
        and (adapter.adapter_residual_before_ln or not adapter.add_layer_norm_after)
        and residual.dtype == h.dtype
        and residual.shape == h.shape
    )
    down_weights, up_weights = weights(layers[-2]), weights(up_layer)
    activation, added = activation_of(layers[-1]), residual if inside else None
    y = up = compacter_adapter(h, down_weights, up_weights, activation=activation, residual=added, scale=scale)
    if not inside:
        if drops_path:
            y = adapter.DropPath(y)
        up = y if channels is None else (y * channels).to(y.dtype)
        y = dropout(up)
        if adapter.use_gating:
            y = y * torch.sigmoid(_in_dtype_of(adapter.gate, x)).mean(dim=1).unsqueeze(-1)
        if residual is not None and adapter.adapter_residual_before_ln:
            y = y + residual
    if adapter.add_layer_norm_after:
        y = _in_dtype_of(adapter.adapter_norm_after, y)
    if not inside and residual is not None and not adapter.adapter_residual_before_ln:
        y = y + residual
    return y, None, up if fused == "up" else None


def _in_dtype_of(module: Any, x: Tensor) -> Any:
    """The module's output in x's dtype; its parameters may have another."""
    dtype = module.weight.dtype
    return module(x) if dtype == x.dtype else module(x.to(dtype)).to(x.dtype)


def describe(adapter: Any) -> str:
    """How a patched adapter runs, for the report."""
    outside = {
        "layer norm before": adapter.add_layer_norm_before,
        "stochastic depth in training": hasattr(adapter, "DropPath"),
        "scaling of each channel": isinstance(adapter.scaling, Tensor) and adapter.scaling.numel() != 1,
        "dropout in training": adapter.dropout.p > 0,
        "gate": adapter.use_gating,
        "layer norm after": adapter.add_layer_norm_after,
        "activation": fused_name(adapter.non_linearity.f) is None,
    }
    names = ", ".join(name for name, is_outside in outside.items() if is_outside)
    how = f"one kernel, but for: {names}" if names else "one kernel"
    return how if adapter.adapter_up.learn_phm else f"{how} (learn_phm=False, but train_adapter trains the rule too)"
