"""Work that the library `adapters` does in every layer and that most models do not need.

Two functions of the library are replaced, for every model of the process. Results are the same.

- `matched`: the Parallel composition can leave query, key and value with batches of different
  size, so the library repeats all three to the largest in every attention. Where the sizes agree,
  that is a copy, with a backward of its own. `matched` makes no copy there.
- `active_setup`: every linear layer searches the active adapters for LoRA, every attention for
  prefixes and every block for ReFT, even in a model that has none of these. `active_setup` first
  looks whether the layer holds any adapter.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from adapters.composition import match_attn_matrices_for_parallel
from adapters.context import AdapterSetup
from adapters.methods.adapter_layer_base import AdapterLayerBase
from torch import Tensor

from compacter_kernels.patch.patch import Entry
from compacter_kernels.private import children

_users: weakref.WeakSet[Any] = weakref.WeakSet()  # models, and the library where it is patched as a whole


def matched(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Instead of match_attn_matrices_for_parallel."""
    if query.shape[0] == key.shape[0] == value.shape[0]:
        return query, key, value
    repeated: tuple[Tensor, ...] = match_attn_matrices_for_parallel(query, key, value)
    return repeated


def active_setup(layer: Any) -> Any:
    """Instead of AdapterLayerBase.get_active_setup."""
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


_REPLACED = (
    (match_attn_matrices_for_parallel, matched, "no copies where the batches agree"),
    (AdapterLayerBase.get_active_setup, active_setup, "no search where a layer holds no adapters"),
)
ENTRIES = tuple(
    Entry(f"{function.__module__}.{function.__qualname__}", f"{gain}, for every model of this process")
    for function, _, gain in _REPLACED
)


def take(user: Any) -> tuple[Entry, ...]:
    """Replace the functions until this user, and every other one, gives them back; their entries."""
    for function, stand_in, _ in _REPLACED:
        _exchange(function, stand_in, function.__name__)
    _users.add(user)
    return ENTRIES


def give_back(user: Any) -> tuple[Entry, ...]:
    """Restore the functions, unless another user remains; the entries of those restored."""
    was_last = set(_users) == {user}
    _users.discard(user)
    if not was_last:
        return ()
    for function, stand_in, _ in _REPLACED:
        _exchange(stand_in, function, function.__name__)
    return ENTRIES


def _exchange(old: Any, new: Any, name: str) -> None:
    """In the class of the method, and in every module of the library that imported the function."""
    modules = [module for path, module in list(sys.modules.items()) if path.startswith("adapters.")]
    for owner in (AdapterLayerBase, *modules):
        if vars(owner).get(name) is old:
            setattr(owner, name, new)
