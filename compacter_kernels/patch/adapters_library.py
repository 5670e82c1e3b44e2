"""Which modules, and which classes, of the library `adapters` get which function."""

from __future__ import annotations

import sys
from typing import Any

from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Adapter, ParallelAdapter, PHMLayer
from torch import nn

from compacter_kernels.patch import adapters_shortcuts, phm_modules
from compacter_kernels.patch.adapters_forward import bottleneck, describe, is_phm_layer, original, originals, projection
from compacter_kernels.patch.adapters_layer import compose_single, layer_forward
from compacter_kernels.patch.methods import put, replaced_by_others
from compacter_kernels.patch.patch import Entry

_OF_LAYERS: dict[str, Any] = {"compose_single": compose_single, "bottleneck_layer_forward": layer_forward}
_OF_CLASSES: dict[tuple[type, str], Any] = {
    (Adapter, "forward"): bottleneck,
    (ParallelAdapter, "forward"): bottleneck,
    (PHMLayer, "forward"): projection,
    **{(BottleneckLayer, name): function for name, function in _OF_LAYERS.items()},
}


def patch_classes() -> tuple[Entry, ...]:
    """Replace the methods on their classes, and take the shortcuts."""
    for (kind, name), function in _OF_CLASSES.items():
        originals.setdefault((kind, name), vars(kind)[name])
        setattr(kind, name, function)
    return (*map(_entry, _OF_CLASSES), *adapters_shortcuts.take(sys.modules["adapters"]))


def unpatch_classes() -> tuple[Entry, ...]:
    """Restore what `patch_classes` replaced."""
    restored = tuple(map(_entry, originals))
    for (kind, name), method in originals.items():
        setattr(kind, name, method)
    originals.clear()
    return (*restored, *adapters_shortcuts.give_back(sys.modules["adapters"]))


def _entry(method: tuple[type, str]) -> Entry:
    kind, name = method
    return Entry(f"{kind.__module__}.{kind.__qualname__}.{name}", "for every model of this process")


def patch_module(module: nn.Module) -> tuple[bool, str] | None:
    """Whether the module is patched and how, or why not; None where there is nothing to report."""
    if isinstance(module, BottleneckLayer):
        return _patch_layer(module)
    if isinstance(module, Adapter):
        return _patch_adapter(module)
    if is_phm_layer(module):
        if replaced_by_others(module, "forward"):
            return False, "its forward was replaced on the module"
        put(module, "forward", projection)
        return True, "one kernel for the layer"
    return None


def _patch_layer(layer: Any) -> tuple[bool, str] | None:
    """The layer that calls the adapters. Only a failure is reported."""
    adapters = [a for a in getattr(layer, "adapters", {}).values() if isinstance(a, Adapter)]
    if not any(is_phm_layer(adapter.adapter_up) for adapter in adapters):
        return None
    inherited = [
        name
        for name in _OF_LAYERS
        if original(type(layer), name) is original(BottleneckLayer, name) and not replaced_by_others(layer, name)
    ]
    if "compose_single" not in inherited:
        return False, "it has a compose_single of its own; its adapters run their PHM layers one by one"
    for name in inherited:
        put(layer, name, _OF_LAYERS[name])
    return None


def _patch_adapter(adapter: Any) -> tuple[bool, str] | None:
    if not any(phm_modules.is_phm_layer(part) for part in adapter.modules()):
        return None  # a bottleneck adapter without Compacter
    if original(type(adapter), "forward") not in {original(kind, "forward") for kind in (Adapter, ParallelAdapter)}:
        return False, f"{type(adapter).__name__} has a forward of its own; its PHM layers run one by one"
    if replaced_by_others(adapter, "forward"):
        return False, "its forward was replaced on the module; its PHM layers run one by one"
    if not is_phm_layer(adapter.adapter_up):
        return False, "one of its projections is not a PHM layer of `adapters`"
    put(adapter, "forward", bottleneck)
    return True, describe(adapter)
