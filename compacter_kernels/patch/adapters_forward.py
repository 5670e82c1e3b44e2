"""The methods of the modules of the library `adapters`, as in version 1.3.0, in the kernels."""

from __future__ import annotations

from typing import Any

import torch
from adapters.composition import Stack
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Adapter, ParallelAdapter, PHMLayer
from torch import Tensor, nn

from compacter_kernels.functional import compacter_adapter, phm_linear
from compacter_kernels.patch import phm_modules
from compacter_kernels.patch.activation_names import fused_name
from compacter_kernels.patch.methods import is_ours, replaced_by_others, runs_more
from compacter_kernels.private import children, hook_tables, parameter
from compacter_kernels.weights import LinearWeights, NormWeights, PHMWeights

# The widest bottleneck of dense projections that the kernels are made for.
WIDEST = 256
# The methods of the library that `patch()` has replaced on their classes.
originals: dict[tuple[type, str], Any] = {}
_BYPASSED = ("compose", "compose_stack", "compose_single", "pre_block")
_inherits: dict[type, bool] = {}  # whether a class of layers has all of these methods from the library


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


def fits(down: Any, up: Any) -> bool:
    """Whether one kernel computes both: PHM layers, or linear layers with a narrow bottleneck."""
    if type(down) is nn.Linear:
        return type(up) is nn.Linear and down.out_features <= WIDEST
    return is_phm_layer(down) and is_phm_layer(up)


def weights(layer: Any) -> Any:
    """PHMWeights or LinearWeights of a projection; shared ones are in the ForwardContext."""
    if type(layer) is nn.Linear:
        return LinearWeights(parameter(layer, "weight").t(), parameter(layer, "bias"))
    return phm_weights(layer)


def phm_weights(layer: Any) -> PHMWeights:
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
    return phm_linear(x, phm_weights(layer))


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
    if len(layers) != 2 + adapter.add_layer_norm_before or not fits(layers[-2], up):
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


def layer_forward(layer: Any, hidden_states: Tensor, residual_input: Tensor | None, layer_norm: Any) -> Any:
    """Instead of BottleneckLayer.bottleneck_layer_forward.

    It is x + up(act(down(x))) + residual_input, then the norm. Most models have a single, plain
    adapter in a layer. Its kernel adds the residual around the layer too. Between two large
    products the code of Python is no longer in the caches of the processor. The number of different
    functions that a call passes through decides its time there. So this function bypasses those
    that the library and `bottleneck` pass through.
    """
    x, residual, adapter = hidden_states, residual_input, None
    if residual is not None and x.shape == residual.shape and x.dtype == residual.dtype:
        adapter = _single(layer)
    if residual is None or adapter is None:
        return original(BottleneckLayer, "bottleneck_layer_forward")(layer, x, residual, layer_norm)
    (down, activation), up = parts(adapter)
    name, norm = activation_of(activation), norm_weights(layer_norm, x) if layer_norm else None
    y = compacter_adapter(
        x, weights(down), weights(up), activation=name, residual=(x, residual), scale=adapter.scaling, norm=norm
    )
    return layer_norm(y) if layer_norm and norm is None else y


def norm_weights(norm: Any, x: Tensor) -> NormWeights | None:
    """The weights of a frozen nn.LayerNorm that the kernel may compute; None where it is called."""
    if type(norm) is not nn.LayerNorm or torch.compiler.is_compiling():
        return None
    weight, bias = parameter(norm, "weight"), parameter(norm, "bias")
    if weight is None or bias is None or weight.requires_grad or bias.requires_grad or runs_more(norm):
        return None
    fits = weight.shape == x.shape[-1:] and weight.dtype == bias.dtype == x.dtype and weight.device == x.device
    return NormWeights(weight, bias, norm.eps) if fits else None


def _single(layer: Any) -> Any:
    """The plain adapter that alone runs behind this layer, or None where anything else runs too."""
    setup = layer.get_active_setup()
    if type(setup) is not Stack or len(setup.children) != 1 or not _composes_as_library(layer):
        return None
    name = setup.children[0]
    adapter = children(children(layer)["adapters"]).get(name) if type(name) is str else None
    return adapter if type(adapter) is Adapter and _is_plain(adapter) and not output_gating() else None


def _composes_as_library(layer: Any) -> bool:
    kind = type(layer)
    if kind not in _inherits:
        _inherits[kind] = all(getattr(kind, name) is getattr(BottleneckLayer, name) for name in _BYPASSED)
    for name in _BYPASSED:
        if replaced_by_others(layer, name):
            return False
    return _inherits[kind]


def output_gating() -> Any:
    """Whether the caller of the model asks for the scores of gates."""
    contexts = ForwardContext.get_contexts()
    return contexts[-1].output_adapter_gating_scores if contexts else False


def _is_plain(adapter: Any) -> bool:
    """Whether it computes x + scale * up(act(down(x))) by one kernel, and has no hooks."""
    attributes, modules = vars(adapter), children(adapter)
    if adapter.add_layer_norm_before or adapter.add_layer_norm_after or adapter.use_gating:
        return False
    if adapter.original_ln_before or not adapter.original_ln_after or adapter.residual_before_ln is not True:
        return False
    if "pre_forward" in attributes or "post_forward" in attributes or "DropPath" in modules:
        return False
    if "scaling" not in attributes and adapter.scaling.numel() != 1:  # only a Parameter is not in there
        return False
    dropout = modules["dropout"]
    drops = dropout.p > 0 and dropout.training
    return not drops and runs_bottleneck(adapter) and can_fuse(adapter, adapter, dropout)


def runs_bottleneck(adapter: Any) -> bool:
    """Whether a call of the adapter runs `bottleneck`."""
    method = vars(adapter).get("forward", type(adapter).forward)
    return method is bottleneck or (is_ours(method) and method.func is bottleneck)


def compose_single(layer: Any, adapter_setup: str, state: Any, lvl: int = 0) -> Any:
    """Instead of BottleneckLayer.compose_single: the adapter adds the residual in its kernel.

    `bottleneck_up` is set only where a fusion layer reads it, and then for every adapter of the
    layer, since the library joins those of several adapters.
    """
    modules = children(layer)
    adapter = children(modules["adapters"])[adapter_setup]
    needs_up = len(children(modules["adapter_fusion_layer"])) > 0
    gating, options = output_gating(), {}
    if not gating and _takes_fused(adapter):  # the gate is one of the outputs that `fused` leaves out
        options["fused"] = "up" if needs_up else "output"
    outputs = adapter(state.hidden_states, residual_input=state.adapter_residual, output_gating=gating, **options)
    if gating:
        layer._store_gating_score(adapter_setup, outputs[-1])
    up = outputs[2] if needs_up else None
    return state._replace(hidden_states=outputs[0], bottleneck_up=up, last=adapter_setup)


def _takes_fused(adapter: Any) -> bool:
    """Whether a call of this adapter runs `bottleneck`, and no hook reads the outputs left out."""
    tables = hook_tables(adapter)
    if tables is None or not runs_bottleneck(adapter):
        return False
    hooks = [hook for table in tables for hook in table.values()]  # those of FSDP do not read the outputs
    return all(str(getattr(hook, "__module__", "")).startswith("torch.distributed") for hook in hooks)
