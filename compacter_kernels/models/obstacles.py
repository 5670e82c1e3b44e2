"""What stands in the way of `inject`, found before anything is changed."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Container, Iterable, Sequence

from torch import nn

from compacter_kernels.models.copies import CopySlot
from compacter_kernels.models.layer import Layer
from compacter_kernels.models.slots import NAME, AdapterSlot, Added, Slot, slot_of
from compacter_kernels.models.wrappers import unwrapped

READERS = ("WavLMAttention",)  # as nn.MultiheadAttention, they read the weights of the modules in them and call none


def check_name(name: str, present: Container[str] = ()) -> None:
    """Raise ValueError for what cannot name adapters, or names some already."""
    plain = isinstance(name, str) and name.isidentifier() and not name.startswith("_")
    slots = AdapterSlot(Layer(nn.Identity(), "")), CopySlot(nn.Identity())
    if not plain or any(hasattr(slot, name) for slot in slots):
        raise ValueError(
            f"name must be a plain name of an adapter, such as 'default', and none that modules of torch use "
            f"themselves; got {name!r}"
        )
    if name in present:
        raise ValueError(f"the model has adapters of the name {name!r} already; give another name=, or remove them")


def check_own_names(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise ValueError if the model, or a module that gets something beside it, has a child `compacter` of its own."""
    for path in ("", *paths):
        if not isinstance(getattr(unwrapped(model.get_submodule(path)), NAME, None), Added | None):
            what = f"{path}.{NAME}" if path else NAME
            raise ValueError(f"the model has a {what} of its own, the name under which adapters go; rename it")


def check_nested(model: nn.Module) -> None:
    """Raise ValueError if a part of the model, or a model that it is part of, has adapters of its own."""
    own = getattr(model, NAME, None)
    inside = [(name.rpartition(".")[0], part) for name, part in model.named_modules() if isinstance(part, Added)]
    for path, part in inside:
        if not isinstance(part, Slot) and part is not own:
            raise ValueError(
                f"{path} has adapters of its own, as inject was called for it alone: go on with inject(model.{path}, "
                f"name=...), or call remove_adapters(model.{path}) first"
            )
    if own is None and inside:
        raise ValueError(
            f"{inside[0][0]} has adapters already, of a model that this {type(model).__name__} is part of: go on with "
            "that one, or call remove_adapters for it first"
        )


def check_beside(model: nn.Module, adapted: Sequence[str], copied: Sequence[str]) -> None:
    """Raise ValueError if a module is to have an adapter that is trained whole, in these adapters or in others."""
    for path, write in itertools.product(copied, adapted):
        if f"{write}.".startswith(f"{path}."):
            raise ValueError(
                f"{path} holds {write}, which gets an adapter, and cannot be trained whole: see modules_to_save"
            )
    for paths, kind, other in ((adapted, AdapterSlot, "trained copies"), (copied, CopySlot, "adapters")):
        for path in paths:
            slot = slot_of(unwrapped(model.get_submodule(path)))
            if slot is not None and not isinstance(slot, kind):
                raise ValueError(f"{path} has {other} already ({', '.join(slot)}); it cannot have both")


def called(model: nn.Module, path: str) -> bool:
    """Whether a module is called, and not only its weights read by the attention around it."""
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    return not any(map(_reads_weights, above))


def _reads_weights(module: nn.Module) -> bool:
    if not isinstance(module, nn.MultiheadAttention):
        return type(module).__name__ in READERS
    for kind in type(module).__mro__:  # a subclass with a forward of its own may call them, unless that calls super's
        forward = vars(kind).get("forward")
        if inspect.isfunction(forward) and "super" not in forward.__code__.co_names:
            return kind is nn.MultiheadAttention
    return True
