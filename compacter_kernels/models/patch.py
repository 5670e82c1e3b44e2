"""ck.patch and ck.unpatch: the kernels under the Compacter modules of other libraries, in place."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from compacter_kernels.models import adapters_library, bottlenecks, phm_modules
from compacter_kernels.models.fused_names import fused_name
from compacter_kernels.models.instances import is_ours, put, replaced_by_others, restore
from compacter_kernels.models.report import Entry, Report
from compacter_kernels.nn import PHMLinear

SUPPORTED = ("1.2.", "1.3.")  # of `adapters`: where the methods that are replaced read the same


def patch(model: nn.Module | None = None) -> Report:
    """Put the kernels under the Compacter modules that are in a model, or under the whole library `adapters`.

    The model keeps its modules, Parameters and state dict and computes the same function with the same gradients. What
    is recognised: the adapters of `adapters` 1.3, and modules built like OpenDelta's, T-Few's and the original
    repository's PHMLinear and HyperComplexAdapter. An adapter runs as one kernel where its options let it, with what is
    between or around its projections done in torch; where they do not, its PHM layers run one by one. Whether the rule
    is trained is left as it was: `learn_phm=False` is undone by the `train_adapter` of `adapters`, patched or not.

    Patching again is harmless, and covers adapters added since.

    Args:
        model: any module. None: the classes of `adapters` in this process, for all models made before and later.

    Returns:
        what was patched and how, what was left and why; it prints as a list.

    Raises:
        TypeError: model is no module.
        ValueError: a model without any PHM layer.
        RuntimeError: `adapters` is not installed (without a model), or is of a version not known.
    """
    if model is None:
        return _patch_library()
    _check_model(model)
    patched, skipped = _patch_model(model)
    if not patched and not skipped:
        raise ValueError(
            f"{type(model).__name__} has no PHM layer: no module with phm_dim, phm_rule and W_left, W_right or W, as "
            "`adapters`, OpenDelta, T-Few and the original repository have them. Add the adapter first; "
            "ck.patch() without a model covers `adapters` models made later"
        )
    return Report(patched=tuple(patched), skipped=tuple(skipped))


def unpatch(model: nn.Module | None = None) -> Report:
    """Undo `patch(model)`, or `patch()`; harmless where nothing is patched.

    Raises:
        TypeError: model is no module.
    """
    if model is None:
        return _unpatch_library()
    _check_model(model)
    restored, skipped = [], []
    for name, module in model.named_modules():
        if names := restore(module):
            restored.append(Entry(name, ", ".join(names)))
        elif is_ours(vars(module).get("_old_forward")):
            skipped.append(Entry(name, "its forward was wrapped after it was patched; remove that hook first"))
    return Report(restored=tuple(restored), skipped=tuple(skipped))


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _adapters() -> Any:
    """`adapters.methods.bottleneck`, which names all classes that are patched; None where it was never imported."""
    module = sys.modules.get("adapters.methods.bottleneck")
    if module is not None:
        version = sys.modules["adapters"].__version__
        if not version.startswith(SUPPORTED):
            raise RuntimeError(
                f"adapters {version} is not known to ck.patch, which replaces methods of 1.3; install that"
            )
    return module


def _patch_model(model: nn.Module) -> tuple[list[Entry], list[Entry]]:
    library = _adapters()
    patched: list[Entry] = []
    skipped: list[Entry] = []
    whole: set[int] = set()  # the PHM layers of adapters that are patched as a whole, which need no line of their own
    for name, module in model.named_modules():
        if library is not None and isinstance(module, library.BottleneckLayer):
            how = _patch_composition(module, library)
        elif library is not None and isinstance(module, library.Adapter):
            how = _patch_adapter(module, library, whole)
        elif bottlenecks.is_bottleneck(module):
            how = _patch_bottleneck(module, whole)
        elif bottlenecks.is_not_built_yet(module):
            how = (False, "it makes its layers in its first call; patch after that")
        elif isinstance(module, PHMLinear):
            how = (False, "it is one of compacter_kernels")
        elif phm_modules.is_projection(module):
            how = _patch_projection(module)
            if id(module) in whole and how is not None and how[0]:
                how = None
        else:
            how = None
        if how is not None:
            (patched if how[0] else skipped).append(Entry(name, how[1]))
    return patched, skipped


Result = tuple[bool, str] | None  # whether it is patched, and how or why not; None: nothing to tell


def _patch_composition(layer: Any, library: Any) -> Result:
    """The layer that calls the adapters; it is worth a line only where it cannot be patched."""
    if not any(isinstance(a, library.Adapter) and _has_phm(a) for a in getattr(layer, "adapters", {}).values()):
        return None
    own = adapters_library.original(library.BottleneckLayer, "compose_single")
    if adapters_library.original(type(layer), "compose_single") is not own or replaced_by_others(
        layer, "compose_single"
    ):
        return False, "it has a compose_single of its own; its adapters run their PHM layers one by one"
    put(layer, "compose_single", adapters_library.compose_single)
    return None


def _has_phm(adapter: Any) -> bool:
    return adapters_library.is_phm_layer(adapter.adapter_up)


def _patch_adapter(adapter: Any, library: Any, whole: set[int]) -> Result:
    if not any(phm_modules.is_projection(part) for part in adapter.modules()):
        return None  # the plain bottleneck adapter
    owns = {adapters_library.original(kind, "forward") for kind in (library.Adapter, library.ParallelAdapter)}
    if adapters_library.original(type(adapter), "forward") not in owns:
        return False, f"{type(adapter).__name__} has a forward of its own; its PHM layers run one by one"
    if replaced_by_others(adapter, "forward"):
        return False, "its forward was replaced on the module; its PHM layers run one by one"
    if not _has_phm(adapter):
        return False, "one of its projections is not a PHM layer of `adapters`"
    put(adapter, "forward", adapters_library.bottleneck)
    whole.update(id(part) for part in adapter.modules())
    return True, adapters_library.describe(adapter)


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


def _patch_projection(layer: nn.Module) -> Result:
    if replaced_by_others(layer, "forward"):
        return False, "its forward was replaced on the module"
    if "adapters.methods.modeling" in sys.modules and adapters_library.is_phm_layer(layer):
        put(layer, "forward", adapters_library.projection)
        return True, "one kernel for the layer"
    if unset := phm_modules.missing(layer):
        return False, f"{', '.join(unset)} have not been set yet"
    if why := bottlenecks.probe_projection(layer):
        return False, why
    put(layer, "forward", phm_modules.forward)
    return True, "one kernel for the layer"


_METHODS = {
    "Adapter": ("forward", adapters_library.bottleneck),
    "ParallelAdapter": ("forward", adapters_library.bottleneck),
    "PHMLayer": ("forward", adapters_library.projection),
    "BottleneckLayer": ("compose_single", adapters_library.compose_single),
}


def _patch_library() -> Report:
    try:
        importlib.import_module("adapters.methods.bottleneck")
    except ImportError as error:
        raise RuntimeError(
            f"ck.patch() without a model speeds up the library `adapters`, which cannot be imported ({error}); "
            "pip install adapters"
        ) from error
    _adapters()
    patched = []
    for kind, name, function in _targets():
        adapters_library.originals.setdefault((kind, name), vars(kind)[name])
        setattr(kind, name, function)
        patched.append(Entry(f"{kind.__module__}.{kind.__qualname__}.{name}", "for every model of this process"))
    return Report(patched=tuple(patched))


def _unpatch_library() -> Report:
    restored = []
    for (kind, name), method in list(adapters_library.originals.items()):
        setattr(kind, name, method)
        del adapters_library.originals[kind, name]
        restored.append(Entry(f"{kind.__module__}.{kind.__qualname__}.{name}", "for every model of this process"))
    return Report(restored=tuple(restored))


def _targets() -> list[tuple[type, str, Any]]:
    places = [sys.modules[f"adapters.methods.{name}"] for name in ("bottleneck", "modeling")]
    kinds = {kind: next(vars(place)[kind] for place in places if kind in vars(place)) for kind in _METHODS}
    return [(kinds[kind], name, function) for kind, (name, function) in _METHODS.items()]
