"""What is special to the library `adapters`: where its Compacter takes weights from, and its bottleneck in one kernel.

The functions stand in for methods of `adapters` 1.3.0: `projection` for PHMLayer.forward, `bottleneck` for
Adapter.forward and ParallelAdapter.forward; those of the layer that calls the adapters are in `adapters_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from adapters.context import ForwardContext
from adapters.methods.modeling import Adapter, ParallelAdapter, PHMLayer
from torch import Tensor, nn

from compacter_kernels.functional import compacter_adapter, phm_linear
from compacter_kernels.patch import phm_modules
from compacter_kernels.patch.fused_names import fused_name
from compacter_kernels.patch.instances import hooked
from compacter_kernels.weights import PHMWeights

# The methods that were replaced on the classes themselves: (class, name) -> the library's own.
originals: dict[tuple[type, str], Any] = {}


def original(kind: type, name: str) -> Any:
    """The method of that class, as it is without this package."""
    for base in kind.__mro__:
        if name in vars(base):
            return originals.get((base, name), vars(base)[name])
    raise AttributeError(f"{kind.__name__} has no {name}")


def weights(layer: Any) -> PHMWeights:
    """The weights of a PHMLayer; shared ones come from the ForwardContext, where the model's forward puts them."""
    if not (layer.shared_phm_rule or layer.shared_W_phm):
        return phm_modules.weights(layer)
    shared = ForwardContext.get_contexts()[-1].shared_parameters[layer.name]
    rules = shared if layer.shared_phm_rule else layer
    if layer.shared_W_phm:
        return phm_modules.weights(layer, rules, shared, f"W_{layer.position}")
    return phm_modules.weights(layer, rules)


def projection(layer: nn.Module, x: Tensor) -> Tensor:
    """Instead of PHMLayer.forward."""
    return phm_linear(x, weights(layer))


def is_phm_layer(module: Any) -> bool:
    """Whether this is a PHMLayer of `adapters` that computes what PHMLayer does."""
    kind = type(module)
    if kind is PHMLayer:
        return True
    return isinstance(module, PHMLayer) and original(kind, "forward") is original(PHMLayer, "forward")


def bottleneck(
    adapter: Any,
    x: Tensor,
    residual_input: Tensor | None,
    output_gating: bool = False,
    fused: str | None = None,
) -> tuple[Any, ...]:
    """Instead of Adapter.forward and ParallelAdapter.forward: output, down, up and, with output_gating, the gate.

    fused: None for all of these; "output" where the caller needs neither down nor up, which are None then; "up" where
    it needs up, as AdapterFusion does.
    """
    parallel = isinstance(adapter, ParallelAdapter)
    if fused is None or not _can_fuse(adapter, residual_input):
        library = original(ParallelAdapter if parallel else Adapter, "forward")  # not a subclass's, which may call this
        plain: tuple[Any, ...] = library(adapter, x, residual_input, output_gating)
        return plain
    drops_path = not parallel and "DropPath" in adapter._modules  # ParallelAdapter has it but does not use it
    residual = None if parallel else residual_input
    scale, channels = adapter.scaling, None
    if isinstance(scale, Tensor) and scale.numel() != 1:
        scale, channels = 1.0, scale
    layers, up_layer = parts(adapter)
    dropout = adapter._modules["dropout"]
    h = _in_dtype_of(layers[0], x) if adapter.add_layer_norm_before else x
    together = (
        fused == "output"
        and residual is not None
        and channels is None
        and not adapter.use_gating
        and not (dropout.training and dropout.p > 0)
        and not hooked(dropout)
        and not (drops_path and adapter.DropPath.training)
        and (adapter.adapter_residual_before_ln or not adapter.add_layer_norm_after)
        and residual.dtype == h.dtype
        and residual.shape == h.shape
    )
    y = compacter_adapter(
        h,
        weights(layers[-2]),
        weights(up_layer),
        activation=activation_of(layers[-1]),
        residual=residual if together else None,
        scale=scale,
    )
    up, gate = y, None
    if not together:
        if drops_path:
            y = adapter.DropPath(y)
        up = y if channels is None else (y * channels).to(y.dtype)
        y = dropout(up)
        if adapter.use_gating:
            gate = torch.sigmoid(_in_dtype_of(adapter.gate, x)).mean(dim=1).unsqueeze(-1)
            y = y * gate
        if residual is not None and adapter.adapter_residual_before_ln:
            y = y + residual
    if adapter.add_layer_norm_after:
        y = _in_dtype_of(adapter.adapter_norm_after, y)
    if not together and residual is not None and not adapter.adapter_residual_before_ln:
        y = y + residual
    output = (y, None, up if fused == "up" else None)
    return (*output, gate) if adapter.use_gating and output_gating else output


def parts(adapter: Any) -> tuple[tuple[Any, ...], Any]:
    """adapter_down's layers, the last of them the activation, and adapter_up, without nn.Module's search for each."""
    modules = adapter._modules
    return tuple(modules["adapter_down"]._modules.values()), modules["adapter_up"]


def activation_of(layer: Any) -> Any:
    """What the kernel is to take for it: a fused name, or the module, to be called."""
    return fused_name(layer._modules.get("f") or layer.f) or layer


def _can_fuse(adapter: Any, residual_input: Tensor | None) -> bool:
    """Whether the kernel may stand for the calls of both projections and what lies between them."""
    layers, up = parts(adapter)
    if residual_input is None or not is_phm_layer(up) or len(layers) != 2 + adapter.add_layer_norm_before:
        return False
    inner = (adapter._modules["adapter_down"], *layers[-2:], *layers[-1]._modules.values(), up)
    return is_phm_layer(layers[-2]) and not hooked(*inner)


def _in_dtype_of(module: Any, x: Tensor) -> Tensor:
    """The module's output in x's dtype, where its parameters may have another."""
    dtype = module.weight.dtype
    result: Tensor = module(x) if dtype == x.dtype else module(x.to(dtype)).to(x.dtype)
    return result


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
    names = [name for name, there in outside.items() if there]
    how = f"one kernel, but for: {', '.join(names)}" if names else "one kernel"
    return how if adapter.adapter_up.learn_phm else f"{how} (learn_phm=False, but train_adapter trains the rule too)"


STAND_INS = {
    (Adapter, "forward"): bottleneck,
    (ParallelAdapter, "forward"): bottleneck,
    (PHMLayer, "forward"): projection,
}
