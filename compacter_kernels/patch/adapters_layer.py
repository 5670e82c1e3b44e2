"""The layers of `adapters` that call its adapters.

`compose_single` and `layer_forward` stand in for the methods compose_single and bottleneck_layer_forward of
BottleneckLayer.

A single, plain adapter, as most models have them, adds the residual around its layer in its kernel. Between two large
products Python's own code has left the caches: what counts there is how many different functions a call passes through,
and hardly how much they read. So `layer_forward` leaves out what the library and `bottleneck` pass through.
"""

from __future__ import annotations

from typing import Any

import torch
from adapters.composition import Stack
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Adapter
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from compacter_kernels.functional import compacter_adapter
from compacter_kernels.patch.adapters_library import activation_of, bottleneck, is_phm_layer, original, parts, weights
from compacter_kernels.patch.instances import hooked, is_ours, replaced_by_others
from compacter_kernels.weights import NormWeights

_BYPASSED = ("compose", "compose_stack", "compose_single", "pre_block")
_inheriting: dict[type, bool] = {}  # whether a class of layers has all of these from the library


def layer_forward(layer: Any, hidden_states: Tensor, residual_input: Tensor | None, layer_norm: Any) -> Tensor:
    """Instead of bottleneck_layer_forward: x + up(act(down(x))) + residual_input, and the norm if there is one."""
    x, residual = hidden_states, residual_input
    alike = residual is not None and x.shape == residual.shape and x.dtype == residual.dtype
    adapter = _single(layer) if alike else None
    if adapter is None:
        library = original(BottleneckLayer, "bottleneck_layer_forward")
        plain: Tensor = library(layer, hidden_states, residual_input, layer_norm)
        return plain
    assert residual is not None
    (down, activation), up = parts(adapter)
    name, scale = activation_of(activation), adapter.scaling
    norm = norm_weights(layer_norm, x) if layer_norm else None
    both = (x, residual)
    y = compacter_adapter(x, weights(down), weights(up), activation=name, residual=both, scale=scale, norm=norm)
    return layer_norm(y) if layer_norm and norm is None else y


def norm_weights(norm: Any, x: Tensor) -> NormWeights | None:
    """The weights of a layer norm that does to rows like x's what nn.LayerNorm does, frozen and unheard; else None."""
    if type(norm) is not nn.LayerNorm or torch.compiler.is_compiling():
        return None
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if weight is None or bias is None or weight.requires_grad or bias.requires_grad or hooked(norm):
        return None
    fits = weight.shape == x.shape[-1:] and weight.dtype == bias.dtype == x.dtype and weight.device == x.device
    return NormWeights(weight, bias, norm.eps) if fits else None


def _single(layer: Any) -> Any:
    """The adapter that is all that runs behind this layer, before its residual and norm; None if there is more."""
    setup = layer.get_active_setup()
    if type(setup) is not Stack or len(setup.children) != 1 or not _composes_as_library(layer):
        return None
    name = setup.children[0]
    adapter = layer._modules["adapters"]._modules.get(name) if type(name) is str else None
    return adapter if type(adapter) is Adapter and _is_plain(adapter) and not _output_gating() else None


def _composes_as_library(layer: Any) -> bool:
    """Whether the methods that are bypassed do what the library's do, on the layer's class and on the layer."""
    kind = type(layer)
    if kind not in _inheriting:
        _inheriting[kind] = all(getattr(kind, name) is getattr(BottleneckLayer, name) for name in _BYPASSED)
    for name in _BYPASSED:
        if replaced_by_others(layer, name):
            return False
    return _inheriting[kind]


def _output_gating() -> Any:
    """Whether the caller of the model asks for the scores of gates."""
    contexts = ForwardContext.get_contexts()
    return contexts[-1].output_adapter_gating_scores if contexts else False


def _is_plain(adapter: Any) -> bool:
    """Whether it computes x + scale * up(act(down(x))) with two PHM layers, and nobody listens to any part of it."""
    own, modules = vars(adapter), adapter._modules
    if (
        adapter.add_layer_norm_before
        or adapter.add_layer_norm_after
        or adapter.use_gating
        or adapter.original_ln_before
        or not adapter.original_ln_after
        or adapter.residual_before_ln is not True
        or "pre_forward" in own
        or "post_forward" in own
        or "DropPath" in modules
    ):
        return False
    (layers, up), dropout = parts(adapter), modules["dropout"]
    if (dropout.p > 0 and dropout.training) or len(layers) != 2:
        return False
    if not (_runs_bottleneck(adapter) and is_phm_layer(layers[0]) and is_phm_layer(up)):
        return False
    if "scaling" not in own and adapter.scaling.numel() != 1:  # a Parameter is not in there
        return False
    inner = (modules["adapter_down"], *layers, *layers[1]._modules.values(), up, dropout)
    return not (_has_any_global_hook() or hooked(adapter, *inner))


def _runs_bottleneck(adapter: Any) -> bool:
    method = vars(adapter).get("forward", type(adapter).forward)
    return method is bottleneck or (is_ours(method) and method.func is bottleneck)


def compose_single(layer: Any, adapter_setup: str, state: Any, lvl: int = 0) -> Any:
    """Instead of BottleneckLayer.compose_single: lets the adapter add the residual inside its kernel.

    `bottleneck_up` is set only where there is a fusion layer to read it, and then for every adapter of the layer, since
    the library joins those of several adapters.
    """
    modules = layer._modules
    adapter = modules["adapters"]._modules[adapter_setup]
    output_gating = _output_gating()
    needs_up = len(modules["adapter_fusion_layer"]._modules) > 0
    options = {}
    if not output_gating and _takes_fused(adapter):  # the gating scores are read from what is returned
        options["fused"] = "up" if needs_up else "output"
    outputs = adapter(
        state.hidden_states, residual_input=state.adapter_residual, output_gating=output_gating, **options
    )
    if output_gating:
        layer._store_gating_score(adapter_setup, outputs[-1])
    up = outputs[2] if needs_up else None
    return state._replace(hidden_states=outputs[0], bottleneck_up=up, last=adapter_setup)


def _takes_fused(adapter: Any) -> bool:
    """Whether `bottleneck` is what a call of this adapter runs, and no hook would miss what that leaves out."""
    if not _runs_bottleneck(adapter) or adapter._backward_hooks or adapter._backward_pre_hooks:
        return False
    if not (adapter._forward_hooks or adapter._forward_pre_hooks):
        return True
    hooks = (*adapter._forward_hooks.values(), *adapter._forward_pre_hooks.values())  # FSDP's look away
    return all(str(getattr(hook, "__module__", "")).startswith("torch.distributed") for hook in hooks)


STAND_INS = {
    (BottleneckLayer, "compose_single"): compose_single,
    (BottleneckLayer, "bottleneck_layer_forward"): layer_forward,
}
