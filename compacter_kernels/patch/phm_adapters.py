"""Whole adapters of OpenDelta, T-Few and the original: down_sampler, activation, up_sampler.

These classes look alike, but some add x and some do not. So `probe` compares a copy that has random
weights with each function that the kernel can compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compacter_kernels.functional import compacter_adapter, phm_linear
from compacter_kernels.nn import PHMLinear
from compacter_kernels.patch import phm_layers
from compacter_kernels.patch.activation_names import fused_name, name_by_values
from compacter_kernels.patch.methods import put, replaced_by_others, runs_more
from compacter_kernels.private import hook_tables

METHODS = ("forward", "post_forward")  # OpenDelta calls post_forward with the output of the adapted module
PARTS = {"down_sampler", "up_sampler", "activation"}
T = TypeVar("T")


def patch_module(module: nn.Module) -> tuple[bool, str] | None:
    """Whether the module is patched and how, or why not; None where there is nothing to report."""
    if is_adapter(module):
        return _patch_adapter(module)
    if is_not_built_yet(module):
        return False, "it makes its layers in its first call; patch after that"
    if isinstance(module, PHMLinear):
        return False, "it is one of compacter_kernels"
    return _patch_layer(module) if phm_layers.is_phm_layer(module) else None


def _patch_adapter(adapter: Any) -> tuple[bool, str]:
    unset = [name for layer in (adapter.down_sampler, adapter.up_sampler) for name in phm_layers.missing(layer)]
    if unset:
        return False, f"{', '.join(dict.fromkeys(unset))} of its layers have not been set yet"
    if any(replaced_by_others(adapter, method) for method in METHODS):
        return False, "its forward was replaced on the module; its PHM layers run one by one"
    fused = probe(adapter)
    if isinstance(fused, str):
        return False, f"{fused}; its PHM layers run one by one"
    put(adapter, fused["method"], call, **fused)
    how = "one kernel, with the residual" if fused["residual"] else "one kernel"
    return True, how if fused["activation"] else f"{how}; its activation is called between the projections"


def _patch_layer(layer: nn.Module) -> tuple[bool, str]:
    if replaced_by_others(layer, "forward"):
        return False, "its forward was replaced on the module"
    if unset := phm_layers.missing(layer):
        return False, f"{', '.join(unset)} have not been set yet"
    if reason := probe_layer(layer):
        return False, reason
    put(layer, "forward", phm_layers.forward)
    return True, "one kernel for the layer"


def is_adapter(module: nn.Module) -> bool:
    """Whether this is an adapter of two PHM layers of these libraries."""
    down, up = getattr(module, "down_sampler", None), getattr(module, "up_sampler", None)
    return phm_layers.is_phm_layer(down) and phm_layers.is_phm_layer(up) and callable(module.activation)


def is_not_built_yet(module: nn.Module) -> bool:
    """Whether this is an adapter of OpenDelta that makes its layers in its first call."""
    return getattr(module, "instantiated", None) is False and hasattr(module, "hypercomplex_division")


def call(adapter: Any, value: Any, *, method: str, activation: str | None, residual: bool) -> Any:
    """Instead of the method of a class of adapters.

    value: x, or for OpenDelta's post_forward also a tuple whose first item is x.
    activation: a name of `activations.FUSED`, or None, where the adapter's own is called.
    """
    x = value[0] if method == "post_forward" and isinstance(value, tuple) else value
    inner = [adapter.down_sampler, adapter.up_sampler]
    if isinstance(adapter.activation, nn.Module):
        inner += adapter.activation.modules()
    if not isinstance(x, Tensor) or runs_more(*inner):
        return getattr(type(adapter), method)(adapter, value)
    y = _in_one_kernel(adapter, x, activation, residual)
    return y if x is value else (y, *value[1:])


def _in_one_kernel(adapter: Any, x: Tensor, activation: str | None, residual: bool) -> Tensor:
    """up(act(down(x))) [+ x]."""
    down, up = adapter.down_sampler, adapter.up_sampler
    return compacter_adapter(
        x,
        phm_layers.weights(down, down, down),
        phm_layers.weights(up, up, up),
        activation=activation or adapter.activation,
        residual=x if residual else None,
    )


def probe_layer(layer: nn.Module) -> str | None:
    """Why the layer's forward is not y = x H + b, or None where it is."""

    def answer(twin: Any, x: Tensor) -> str | None:
        same = _agrees(twin, "forward", x, lambda: phm_linear(x, phm_layers.weights(twin, twin, twin)))
        return None if same else "its forward computes something else than x H + b"

    return _ask(layer, layer, "forward", answer)


def probe(adapter: Any) -> dict[str, Any] | str:
    """The options with which `call` computes what the adapter does, or why there are none."""
    others = {name for name, child in adapter.named_children() if child is not None} - PARTS
    if others:
        return f"it also holds {', '.join(sorted(others))}"
    own = {name: getattr(type(adapter), name, nn.Module.forward) for name in METHODS}
    methods = [name for name, function in own.items() if function is not nn.Module.forward]
    if len(methods) != 1:
        return f"it has {len(methods)} of the methods {' and '.join(METHODS)}"
    (method,) = methods

    def answer(twin: Any, x: Tensor) -> dict[str, Any] | str:
        inner = getattr(twin.activation, "f", twin.activation)  # the wrappers of activations have it in f
        names = (fused_name(twin.activation), fused_name(inner), name_by_values(inner))
        for activation in dict.fromkeys((*(name for name in names if name), None)):
            for residual in (False, True):
                if _agrees(twin, method, x, partial(_in_one_kernel, twin, x, activation, residual)):
                    return {"method": method, "activation": activation, "residual": residual}
        return f"its {method} computes something else than up(act(down(x))), with or without + x"

    return _ask(adapter, adapter.down_sampler, method, answer)


def _ask(module: nn.Module, layer: Any, method: str, answer: Callable[[Any, Tensor], T]) -> T | str:
    """`answer` of a copy of the module and an x for its first PHM layer, or why this failed."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return answer(_drawn_anew(module), torch.randn(2, 3, layer.in_features, dtype=torch.float64))
    except Exception as error:  # the code of another library may raise anything; the module is then left as it is
        return f"asking its {method} failed: {type(error).__name__}: {error}"


def _drawn_anew(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float64 with random weights, which shares nothing with the module."""
    twin = copy.deepcopy(module).to_empty(device="cpu").double()
    for part in twin.modules():
        for table in hook_tables(part) or ():
            table.clear()
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                vars(part)[name] = torch.randn(value.shape, dtype=torch.float64)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.normal_()
    return twin


def _agrees(twin: nn.Module, method: str, x: Tensor, expected: Callable[[], Tensor]) -> bool:
    """Whether the method computes this in evaluation and in training, where dropout acts."""
    for training in (False, True):
        twin.train(training)
        torch.manual_seed(1)
        y = expected()
        torch.manual_seed(1)
        value = getattr(type(twin), method)(twin, x)
        if not isinstance(value, Tensor) or value.shape != y.shape or not torch.allclose(value, y, rtol=1e-8):
            return False
    return True
