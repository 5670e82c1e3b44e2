"""The layers that call the adapters of the library `adapters`.

`compose_single` and `layer_forward` stand in for the methods compose_single and
bottleneck_layer_forward of BottleneckLayer.

Most models have a single, plain adapter in a layer. Its kernel adds the residual around the layer
too. Between two large products the code of Python is no longer in the caches of the processor. The
number of different functions that a call passes through decides its time there. So `layer_forward`
bypasses the functions that the library and `bottleneck` pass through.
"""

from __future__ import annotations

from typing import Any

import torch
from adapters.composition import Stack
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Adapter
from torch import Tensor, nn

from compacter_kernels.functional import compacter_adapter
from compacter_kernels.patch.adapters_forward import activation_of, bottleneck, can_fuse, original, parts, weights
from compacter_kernels.patch.methods import is_ours, replaced_by_others, runs_more
from compacter_kernels.private import children, hook_tables, parameter
from compacter_kernels.weights import NormWeights

_BYPASSED = ("compose", "compose_stack", "compose_single", "pre_block")
_inherits: dict[type, bool] = {}  # whether a class of layers has all of these methods from the library


def layer_forward(layer: Any, hidden_states: Tensor, residual_input: Tensor | None, layer_norm: Any) -> Any:
    """Instead of bottleneck_layer_forward: x + up(act(down(x))) + residual_input, then the norm."""
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
    return adapter if type(adapter) is Adapter and _is_plain(adapter) and not _output_gating() else None


def _composes_as_library(layer: Any) -> bool:
    """Whether the layer has the library's own version of each method that is bypassed."""
    kind = type(layer)
    if kind not in _inherits:
        _inherits[kind] = all(getattr(kind, name) is getattr(BottleneckLayer, name) for name in _BYPASSED)
    for name in _BYPASSED:
        if replaced_by_others(layer, name):
            return False
    return _inherits[kind]


def _output_gating() -> Any:
    """Whether the caller of the model asks for the scores of gates."""
    contexts = ForwardContext.get_contexts()
    return contexts[-1].output_adapter_gating_scores if contexts else False


def _is_plain(adapter: Any) -> bool:
    """Whether it computes x + scale * up(act(down(x))) with two PHM layers, and has no hooks."""
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
    if (dropout.p > 0 and dropout.training) or not _runs_bottleneck(adapter):
        return False
    return can_fuse(adapter, adapter, dropout)


def _runs_bottleneck(adapter: Any) -> bool:
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
    gating, options = _output_gating(), {}
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
    if tables is None or not _runs_bottleneck(adapter):
        return False
    hooks = [hook for table in tables for hook in table.values()]  # those of FSDP do not read the outputs
    return all(str(getattr(hook, "__module__", "")).startswith("torch.distributed") for hook in hooks)
