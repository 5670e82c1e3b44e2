"""What is special to the library `adapters`: where its Compacter takes weights from, and its bottleneck in one kernel.

The functions stand in for methods of `adapters` 1.3.0: `projection` for PHMLayer.forward, `bottleneck` for
Adapter.forward and ParallelAdapter.forward, `compose_single` and `layer_forward` for the methods compose_single and
bottleneck_layer_forward of BottleneckLayer.
"""

from __future__ import annotations

from typing import Any

import torch
from adapters.composition import Stack
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Adapter, ParallelAdapter, PHMLayer
from torch import Tensor, nn

from compacter_kernels.functional import compacter_adapter, phm_linear
from compacter_kernels.models import phm_modules
from compacter_kernels.models.fused_names import fused_name
from compacter_kernels.models.instances import hooked, is_ours, replaced_by_others
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
    shared = ForwardContext.get_context().shared_parameters[layer.name]
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
    also: Tensor | None = None,
) -> tuple[Any, ...]:
    """Instead of Adapter.forward and ParallelAdapter.forward: output, down, up and, with output_gating, the gate.

    fused: None for all of these; "output" where the caller needs neither down nor up, which are None then; "up" where
    it needs up, as AdapterFusion does. also: what the caller adds to the output next, with fused="output" only.
    """
    parallel = isinstance(adapter, ParallelAdapter)
    if fused is None or not _can_fuse(adapter, residual_input):
        library = original(ParallelAdapter if parallel else Adapter, "forward")  # not a subclass's, which may call this
        plain: tuple[Any, ...] = library(adapter, x, residual_input, output_gating)
        return plain if also is None else (plain[0] + also, *plain[1:])
    drops_path = not parallel and "DropPath" in adapter._modules  # ParallelAdapter has it but does not use it
    residual = None if parallel else residual_input
    scale, channels = adapter.scaling, None
    if isinstance(scale, Tensor) and scale.numel() != 1:
        scale, channels = 1.0, scale
    layers, up_layer, activation = _parts(adapter)
    dropout, function = adapter._modules["dropout"], activation._modules.get("f") or activation.f
    h = _in_dtype_of(layers[0], x) if adapter.add_layer_norm_before else x
    together = (
        fused == "output"
        and residual is not None
        and channels is None
        and not adapter.use_gating
        and not (dropout.training and dropout.p > 0)
        and not (drops_path and adapter.DropPath.training)
        and (adapter.adapter_residual_before_ln or not adapter.add_layer_norm_after)
        and residual.dtype == h.dtype
        and residual.shape == h.shape
    )
    added: Any = residual if together else None
    both = together and also is not None and not adapter.add_layer_norm_after
    if both:
        added = (residual, also)
    y = compacter_adapter(
        h,
        weights(layers[-2]),
        weights(up_layer),
        activation=fused_name(function) or activation,
        residual=added,
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
    if also is not None and not both:
        y = y + also
    output = (y, None, up if fused == "up" else None)
    return (*output, gate) if adapter.use_gating and output_gating else output


def _parts(adapter: Any) -> tuple[tuple[Any, ...], Any, Any]:
    """adapter_down's layers, adapter_up and non_linearity, without the search that nn.Module makes for each."""
    modules = adapter._modules
    return tuple(modules["adapter_down"]._modules.values()), modules["adapter_up"], modules["non_linearity"]


def _can_fuse(adapter: Any, residual_input: Tensor | None) -> bool:
    """Whether the kernel may stand for the calls of both projections and what lies between them."""
    layers, up, activation = _parts(adapter)
    if residual_input is None or not is_phm_layer(up) or len(layers) != 2 + adapter.add_layer_norm_before:
        return False
    inner = (adapter._modules["adapter_down"], layers[-2], activation, *activation._modules.values(), up)
    return is_phm_layer(layers[-2]) and not hooked(*inner)


def _in_dtype_of(module: Any, x: Tensor) -> Tensor:
    """The module's output in x's dtype, where its parameters may have another."""
    dtype = module.weight.dtype
    result: Tensor = module(x) if dtype == x.dtype else module(x.to(dtype)).to(x.dtype)
    return result


def layer_forward(layer: Any, hidden_states: Tensor, residual_input: Tensor | None, layer_norm: Any) -> Tensor:
    """Instead of bottleneck_layer_forward: a single adapter adds the layer's residual in its kernel too."""
    alike = residual_input is not None and _alike(hidden_states, residual_input)
    adapter = _single(layer) if alike else None
    if adapter is None:
        library = original(BottleneckLayer, "bottleneck_layer_forward")
        plain: Tensor = library(layer, hidden_states, residual_input, layer_norm)
        return plain
    y: Tensor = adapter(hidden_states, residual_input=hidden_states, fused="output", also=residual_input)[0]
    return layer_norm(y) if layer_norm else y


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _single(layer: Any) -> Any:
    """The adapter that is all that runs behind this layer, where it comes before the layer's residual and norm."""
    setup = layer.get_active_setup()
    if type(setup) is not Stack or len(setup.children) != 1:
        return None
    adapter = layer._modules["adapters"]._modules.get(setup.children[0])
    context = ForwardContext.get_context()
    if (
        type(adapter) is Adapter
        and adapter.residual_before_ln is True
        and adapter.original_ln_after
        and not adapter.original_ln_before
        and {"pre_forward", "post_forward"}.isdisjoint(vars(adapter))
        and not (context is not None and context.output_adapter_gating_scores)
        and takes_fused(adapter)
        and _composes_as_library(layer)
    ):
        return adapter
    return None


_BYPASSED = ("compose", "compose_stack", "compose_single", "pre_block")
_OTHERS = frozenset(_BYPASSED) - {"compose_single"}
_inheriting: dict[type, bool] = {}  # whether a class has all of them from the library


def _composes_as_library(layer: Any) -> bool:
    """Whether the methods that are bypassed do what the library's do, on the layer's class and on the layer."""
    kind = type(layer)
    if kind not in _inheriting:
        _inheriting[kind] = all(getattr(kind, name) is getattr(BottleneckLayer, name) for name in _BYPASSED)
    own = _OTHERS.isdisjoint(vars(layer)) and not replaced_by_others(layer, "compose_single")
    return own and _inheriting[kind]


def compose_single(layer: Any, adapter_setup: str, state: Any, lvl: int = 0) -> Any:
    """Instead of BottleneckLayer.compose_single: lets the adapter add the residual inside its kernel.

    `bottleneck_up` is set only where there is a fusion layer to read it, and then for every adapter of the layer, since
    the library joins those of several adapters.
    """
    modules = layer._modules
    adapter = modules["adapters"]._modules[adapter_setup]
    context = ForwardContext.get_context()
    output_gating = context.output_adapter_gating_scores if context is not None else False
    needs_up = len(modules["adapter_fusion_layer"]._modules) > 0
    options = {}
    if not output_gating and takes_fused(adapter):  # the gating scores are read from what is returned
        options["fused"] = "up" if needs_up else "output"
    outputs = adapter(
        state.hidden_states, residual_input=state.adapter_residual, output_gating=output_gating, **options
    )
    if output_gating:
        layer._store_gating_score(adapter_setup, outputs[-1])
    up = outputs[2] if needs_up else None
    return state._replace(hidden_states=outputs[0], bottleneck_up=up, last=adapter_setup)


def takes_fused(adapter: Any) -> bool:
    """Whether `bottleneck` is what a call of this adapter runs, and no hook would miss what that leaves out."""
    method = vars(adapter).get("forward", type(adapter).forward)
    if not (method is bottleneck or (is_ours(method) and method.func is bottleneck)):
        return False
    if adapter._backward_hooks or adapter._backward_pre_hooks:
        return False
    if not (adapter._forward_hooks or adapter._forward_pre_hooks):
        return True
    hooks = (*adapter._forward_hooks.values(), *adapter._forward_pre_hooks.values())  # FSDP's look away
    return all(str(getattr(hook, "__module__", "")).startswith("torch.distributed") for hook in hooks)


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
