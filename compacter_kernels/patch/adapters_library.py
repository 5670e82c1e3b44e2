"""Which modules, classes and functions of the library `adapters` get which function.

Two functions get shortcuts, `matched` and `active_setup`, for every model of the process. These
leave out work that most models do not need. Results are the same.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from adapters.composition import match_attn_matrices_for_parallel
from adapters.context import AdapterSetup
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.modeling import Adapter, ParallelAdapter, PHMLayer
from torch import Tensor, nn

from compacter_kernels.patch import Entry, adapters_bank, adapters_forward, phm_modules
from compacter_kernels.patch.activation_names import fused_name
from compacter_kernels.patch.adapters_forward import WIDEST, fits, is_phm_layer, original, originals
from compacter_kernels.patch.methods import put, replaced_by_others
from compacter_kernels.private import children

_OF_CLASSES: dict[tuple[type, str], Any] = {
    (Adapter, "forward"): adapters_forward.bottleneck,
    (ParallelAdapter, "forward"): adapters_forward.bottleneck,
    (PHMLayer, "forward"): adapters_forward.projection,
    (BottleneckLayer, "compose_single"): adapters_forward.compose_single,
    (BottleneckLayer, "bottleneck_layer_forward"): adapters_forward.layer_forward,
    (BottleneckLayer, "compose_batch_split"): adapters_bank.compose_batch_split,
    (BottleneckLayer, "compose_average"): adapters_bank.compose_average,
}


def patch_module(module: nn.Module) -> tuple[bool, str] | None:
    """Whether the module is patched and how, or why not; None where there is nothing to report."""
    if isinstance(module, BottleneckLayer):
        return _patch_layer(module)
    if isinstance(module, Adapter):
        return _patch_adapter(module)
    if is_phm_layer(module):
        if replaced_by_others(module, "forward"):
            return False, "its forward was replaced on the module"
        put(module, "forward", adapters_forward.projection)
        return True, "one kernel for the layer"
    return None


def _patch_layer(layer: Any) -> tuple[bool, str] | None:
    """The layer that calls the adapters. Only a failure is reported."""
    adapters = [a for a in getattr(layer, "adapters", {}).values() if isinstance(a, Adapter)]
    if not any(is_phm_layer(adapter.adapter_up) or type(adapter.adapter_up) is nn.Linear for adapter in adapters):
        return None
    names = [name for kind, name in _OF_CLASSES if kind is BottleneckLayer and not replaced_by_others(layer, name)]
    inherited = [name for name in names if original(type(layer), name) is original(BottleneckLayer, name)]
    if "compose_single" not in inherited:
        return False, "it has a compose_single of its own; its adapters run their layers one by one"
    for name in inherited:
        put(layer, name, _OF_CLASSES[BottleneckLayer, name])
    return None


def _patch_adapter(adapter: Any) -> tuple[bool, str] | None:
    kind = "PHM layers" if any(phm_modules.is_phm_layer(part) for part in adapter.modules()) else "linear layers"
    if original(type(adapter), "forward") not in {original(kind, "forward") for kind in (Adapter, ParallelAdapter)}:
        return False, f"{type(adapter).__name__} has a forward of its own; its {kind} run one by one"
    if replaced_by_others(adapter, "forward"):
        return False, f"its forward was replaced on the module; its {kind} run one by one"
    layers, up = adapters_forward.parts(adapter)
    if len(layers) < 2 or not fits(layers[-2], up):
        if type(up) is nn.Linear and up.in_features > WIDEST:
            return False, f"its bottleneck of {up.in_features} is wider than {WIDEST}; its linear layers run one by one"
        return False, "its projections are not two PHM layers, nor two linear layers, of `adapters`"
    put(adapter, "forward", adapters_forward.bottleneck)
    in_torch = {
        "layer norm before": adapter.add_layer_norm_before,
        "stochastic depth in training": hasattr(adapter, "DropPath"),
        "scaling of each channel": isinstance(adapter.scaling, Tensor) and adapter.scaling.numel() != 1,
        "dropout in training": adapter.dropout.p > 0,
        "gate": adapter.use_gating,
        "layer norm after": adapter.add_layer_norm_after,
        "activation": fused_name(adapter.non_linearity.f) is None,
    }
    names = ", ".join(name for name, is_in_torch in in_torch.items() if is_in_torch)
    how = f"one kernel, but for: {names}" if names else "one kernel"
    rule = "" if getattr(up, "learn_phm", True) else " (learn_phm=False, but train_adapter trains the rule too)"
    return True, how + rule


def matched(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """Instead of match_attn_matrices_for_parallel, which copies all three in every attention.

    The Parallel composition can leave query, key and value with batches of different size, so the
    library repeats them to the largest. Where the sizes agree, no copy is needed, which would have
    a backward of its own.
    """
    if query.shape[0] == key.shape[0] == value.shape[0]:
        return query, key, value
    return match_attn_matrices_for_parallel(query, key, value)


def active_setup(layer: Any) -> Any:
    """Instead of AdapterLayerBase.get_active_setup: first look whether the layer holds any adapter.

    The library searches the active adapters for LoRA in every linear layer, for prefixes in every
    attention and for ReFT in every block, even in a model that has none of these.
    """
    name = layer.adapter_modules_name
    modules = children(layer).get(name)
    held = getattr(layer, name) if modules is None else children(modules)
    if not held:
        return None
    contexts, config = AdapterSetup.get_contexts(), layer.adapters_config
    setup = contexts[-1].adapter_setup if contexts else config.active_setup
    if setup is None or (config.skip_layers is not None and layer.layer_idx in config.skip_layers):
        return None
    names = setup.children
    if len(names) == 1 and type(names[0]) is str:  # `flatten` would make a set of this one
        return setup if names[0] in held else None
    return None if setup.flatten().isdisjoint(held) else setup


def _entry(path: str, name: str, gain: str = "") -> Entry:
    return Entry(f"{path}.{name}", f"{gain}for every model of this process")


_SHORTCUTS = (
    (match_attn_matrices_for_parallel, matched, "no copies where the batches agree, "),
    (AdapterLayerBase.get_active_setup, active_setup, "no search where a layer holds no adapters, "),
)
SHORTCUTS = tuple(_entry(function.__module__, function.__qualname__, gain) for function, _, gain in _SHORTCUTS)
_METHODS = tuple(_entry(f"{kind.__module__}.{kind.__qualname__}", name) for kind, name in _OF_CLASSES)
_users: weakref.WeakSet[Any] = weakref.WeakSet()  # models with the shortcuts, and the library if patched as a whole


def patch_classes() -> tuple[Entry, ...]:
    """Replace the methods on their classes, and take the shortcuts."""
    for (kind, name), function in _OF_CLASSES.items():
        originals.setdefault((kind, name), getattr(kind, name))
        setattr(kind, name, function)
    return (*_METHODS, *take_shortcuts(sys.modules["adapters"]))


def unpatch_classes() -> tuple[Entry, ...]:
    """Restore what `patch_classes` replaced."""
    restored = _METHODS if originals else ()
    for (kind, name), method in originals.items():
        if any(vars(base).get(name) is method for base in kind.__mro__[1:]):
            delattr(kind, name)  # the class had it from a base
        else:
            setattr(kind, name, method)
    originals.clear()
    return (*restored, *give_back_shortcuts(sys.modules["adapters"]))


def take_shortcuts(user: Any) -> tuple[Entry, ...]:
    """Replace the functions until this user, and every other one, gives them back."""
    _users.add(user)
    return _exchange()


def give_back_shortcuts(user: Any) -> tuple[Entry, ...]:
    """Restore the functions, unless another user remains; the entries of those restored."""
    was_last = set(_users) == {user}
    _users.discard(user)
    return _exchange(back=True) if was_last else ()


def _exchange(back: bool = False) -> tuple[Entry, ...]:
    """In the class of the method, and in every module of the library that imported the function."""
    modules = [module for path, module in list(sys.modules.items()) if path.startswith("adapters.")]
    for function, stand_in, _ in _SHORTCUTS:
        old, new = (stand_in, function) if back else (function, stand_in)
        for owner in (AdapterLayerBase, *modules):
            if vars(owner).get(function.__name__) is old:
                setattr(owner, function.__name__, new)
    return SHORTCUTS
