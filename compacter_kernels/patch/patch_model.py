"""Which modules of a model get which function, and why others are left."""

from __future__ import annotations

from typing import Any

from torch import nn

from compacter_kernels.nn import PHMLinear
from compacter_kernels.patch import bottlenecks, phm_modules
from compacter_kernels.patch.instances import put, replaced_by_others
from compacter_kernels.patch.patch_library import part_of_ours, serves
from compacter_kernels.patch.report import Entry, Report

Result = tuple[bool, str] | None  # whether it is patched, and how or why not; None: nothing to tell


def patch_model(model: nn.Module) -> Report:
    """Put the functions onto the modules that are recognised."""
    library, layers = map(part_of_ours, ("adapters_library", "adapters_layer")) if serves(model) else (None, None)
    patched: list[Entry] = []
    skipped: list[Entry] = []
    whole: set[int] = set()  # the parts of adapters that are patched as a whole, which need no line of their own
    for name, module in model.named_modules():
        if layers is not None and isinstance(module, layers.BottleneckLayer):
            result = _patch_layer(module, library, layers)
        else:
            result = _patch_module(module, library, whole)
        if result is not None:
            (patched if result[0] else skipped).append(Entry(name, result[1]))
    if library is not None and patched:
        shortcuts = part_of_ours("library_shortcuts")
        shortcuts.take(model)
        patched += shortcuts.ENTRIES
    return Report(patched=tuple(patched), skipped=tuple(skipped))


def _patch_module(module: nn.Module, library: Any, whole: set[int]) -> Result:
    if library is not None and isinstance(module, library.Adapter):
        return _patch_adapter(module, library, whole)
    if bottlenecks.is_bottleneck(module):
        return _patch_bottleneck(module, whole)
    if bottlenecks.is_not_built_yet(module):
        return False, "it makes its layers in its first call; patch after that"
    if isinstance(module, PHMLinear):
        return False, "it is one of compacter_kernels"
    if phm_modules.is_projection(module):
        result = _patch_projection(module, library)
        return None if result[0] and id(module) in whole else result
    return None


def _patch_layer(layer: Any, library: Any, layers: Any) -> Result:
    """The layer that calls the adapters; it is worth a line only where it cannot be patched."""
    adapters = [a for a in getattr(layer, "adapters", {}).values() if isinstance(a, library.Adapter)]
    if not any(library.is_phm_layer(adapter.adapter_up) for adapter in adapters):
        return None
    inherited = {
        name: function for (kind, name), function in layers.STAND_INS.items() if _inherits(layer, kind, name, library)
    }
    if "compose_single" not in inherited:
        return False, "it has a compose_single of its own; its adapters run their PHM layers one by one"
    for name, function in inherited.items():
        put(layer, name, function)
    return None


def _inherits(layer: Any, kind: type, name: str, library: Any) -> bool:
    """Whether a layer has this method from that class of the library, and not one of its own."""
    own = library.original(kind, name)
    return library.original(type(layer), name) is own and not replaced_by_others(layer, name)


def _patch_adapter(adapter: Any, library: Any, whole: set[int]) -> Result:
    if not any(phm_modules.is_projection(part) for part in adapter.modules()):
        return None  # the plain bottleneck adapter
    owns = {library.original(kind, "forward") for kind in (library.Adapter, library.ParallelAdapter)}
    if library.original(type(adapter), "forward") not in owns:
        return False, f"{type(adapter).__name__} has a forward of its own; its PHM layers run one by one"
    if replaced_by_others(adapter, "forward"):
        return False, "its forward was replaced on the module; its PHM layers run one by one"
    if not library.is_phm_layer(adapter.adapter_up):
        return False, "one of its projections is not a PHM layer of `adapters`"
    put(adapter, "forward", library.bottleneck)
    whole.update(id(part) for part in adapter.modules())
    return True, library.describe(adapter)


def _patch_bottleneck(adapter: Any, whole: set[int]) -> Result:
    unset = [name for layer in (adapter.down_sampler, adapter.up_sampler) for name in phm_modules.missing(layer)]
    if unset:
        return False, f"{', '.join(dict.fromkeys(unset))} of its layers have not been set yet"
    if any(replaced_by_others(adapter, method) for method in bottlenecks.METHODS):
        return False, "its forward was replaced on the module; its PHM layers run one by one"
    found = bottlenecks.probe(adapter)
    if isinstance(found, str):
        return False, f"{found}; its PHM layers run one by one"
    function = {"forward": bottlenecks.forward, "post_forward": bottlenecks.post_forward}[found.method]
    put(adapter, found.method, function, activation=found.activation, residual=found.residual)
    whole.update((id(adapter.down_sampler), id(adapter.up_sampler)))
    how = "one kernel, with the residual" if found.residual else "one kernel"
    return True, how if found.activation else f"{how}; its activation is called between the projections"


def _patch_projection(layer: nn.Module, library: Any) -> tuple[bool, str]:
    if replaced_by_others(layer, "forward"):
        return False, "its forward was replaced on the module"
    if library is not None and library.is_phm_layer(layer):
        put(layer, "forward", library.projection)
        return True, "one kernel for the layer"
    if unset := phm_modules.missing(layer):
        return False, f"{', '.join(unset)} have not been set yet"
    if why := bottlenecks.probe_projection(layer):
        return False, why
    put(layer, "forward", phm_modules.forward)
    return True, "one kernel for the layer"
