"""What stands in the way of `inject`, found before anything is changed."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Sequence

from torch import nn

from compacter_kernels.inject.target_adapters import AddedModules, TargetAdapters, added_modules
from compacter_kernels.inject.trained_copies import TrainedCopies
from compacter_kernels.targets.added import NAME, Added
from compacter_kernels.targets.layer import Layer
from compacter_kernels.targets.wrappers import unwrapped


def check_name(name: str, present: Container[str] = ()) -> None:
    """Raise ValueError for what cannot name adapters, or names some already."""
    plain = isinstance(name, str) and name.isidentifier() and not name.startswith("_")
    slots = TargetAdapters(Layer(nn.Identity(), "")), TrainedCopies(nn.Identity())
    if not plain or any(hasattr(slot, name) for slot in slots):
        raise ValueError(
            f"name must be a plain name of an adapter, such as 'default', and none that modules of torch use "
            f"themselves; got {name!r}"
        )
    if name in present:
        raise ValueError(f"the model has adapters of the name {name!r} already; give another name=, or remove them")


def check_child_names(model: nn.Module, paths: Iterable[str]) -> None:
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
        if not isinstance(part, AddedModules) and part is not own:
            raise ValueError(
                f"{path} has adapters of its own, as inject was called for it alone: go on with inject(model.{path}, "
                f"name=...), or call remove_adapters(model.{path}) first"
            )
    if own is None and inside:
        raise ValueError(
            f"{inside[0][0]} has adapters already, of a model that this {type(model).__name__} is part of: go on with "
            "that one, or call remove_adapters for it first"
        )


def check_adapted_or_copied(model: nn.Module, adapted: Sequence[str], copied: Sequence[str]) -> None:
    """Raise ValueError if a module is to have an adapter that is trained whole, in these adapters or in others."""
    for path, write in itertools.product(copied, adapted):
        if f"{write}.".startswith(f"{path}."):
            raise ValueError(
                f"{path} holds {write}, which gets an adapter, and cannot be trained whole: see modules_to_save"
            )
    for paths, kind, other in ((adapted, TargetAdapters, "trained copies"), (copied, TrainedCopies, "adapters")):
        for path in paths:
            slot = added_modules(unwrapped(model.get_submodule(path)))
            if slot is not None and not isinstance(slot, kind):
                raise ValueError(f"{path} has {other} already ({', '.join(slot)}); it cannot have both")
