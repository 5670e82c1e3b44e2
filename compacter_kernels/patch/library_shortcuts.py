"""What the library `adapters` does in every layer for nothing: left out while anything is patched, with equal results.

- `matched` for the copies of query, key and value in every attention. The Parallel composition can leave them with
  batches of different size, so all three are repeated to the largest. Where the sizes agree, as they do everywhere
  else, that is `tensor.repeat(1, 1, 1, 1)`: a copy, with a backward of its own.
- `active_setup` for the search for active adapters, which every linear layer makes for LoRA, every attention for
  prefixes and every block for ReFT, even in a model that has none of these. Between two large products its code and
  data have left the caches, and it takes many times what it does in a loop; now a layer first looks whether it holds
  any.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from adapters.context import AdapterSetup
from adapters.methods.adapter_layer_base import AdapterLayerBase
from torch import Tensor

from compacter_kernels.patch.report import Entry

_originals: dict[str, Any] = {}  # the library's functions while ours stand in for them
_users: weakref.WeakSet[Any] = weakref.WeakSet()  # the patched models, and the library where it is patched as a whole


def matched(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Instead of match_attn_matrices_for_parallel."""
    if query.shape[0] == key.shape[0] == value.shape[0]:
        return query, key, value
    repeated: tuple[Tensor, ...] = _originals["match_attn_matrices_for_parallel"](query, key, value)
    return repeated


def active_setup(layer: Any) -> Any:
    """Instead of AdapterLayerBase.get_active_setup."""
    modules = layer._modules.get(layer.adapter_modules_name)
    held = getattr(layer, layer.adapter_modules_name) if modules is None else modules._modules
    if not held:
        return None
    contexts, config = AdapterSetup.get_contexts(), layer.adapters_config
    setup = contexts[-1].adapter_setup if contexts else config.active_setup
    if setup is None or (config.skip_layers is not None and layer.layer_idx in config.skip_layers):
        return None
    children = setup.children
    if len(children) == 1 and type(children[0]) is str:  # what `flatten` makes a set of
        return setup if children[0] in held else None
    return None if setup.flatten().isdisjoint(held) else setup


_STAND_INS: dict[str, Callable[..., Any]] = {
    "match_attn_matrices_for_parallel": matched,
    "get_active_setup": active_setup,
}
ENTRIES = (
    Entry(
        "adapters.composition.match_attn_matrices_for_parallel",
        "no copies where the batches agree, for every model of this process",
    ),
    Entry(
        "adapters.methods.adapter_layer_base.AdapterLayerBase.get_active_setup",
        "no search where a layer holds no adapters, for every model of this process",
    ),
)


def take(user: Any) -> None:
    """Take the shortcuts from now on, for this user among others."""
    if not _originals:  # users may have been collected
        for name, stand_in in _STAND_INS.items():
            _originals[name] = next(vars(place)[name] for place in _places() if name in vars(place))
            _swap(name, _originals[name], stand_in)
    _users.add(user)


def give_back(user: Any) -> tuple[Entry, ...]:
    """Let the library go its own way, unless another user remains; the lines of what that changed."""
    if user not in _users:
        return ()
    _users.remove(user)
    if _users:
        return ()
    for name, stand_in in _STAND_INS.items():
        _swap(name, stand_in, _originals.pop(name))
    return ENTRIES


def _places() -> list[Any]:
    """The class of the method, and every module of the library, some of which have imported the function."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("adapters.")]
    return [AdapterLayerBase, *modules]


def _swap(name: str, old: Any, new: Any) -> None:
    for place in _places():
        if vars(place).get(name) is old:
            setattr(place, name, new)
