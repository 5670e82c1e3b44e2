"""Checks that `inject` makes before it changes a model. Each raises ValueError."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Sequence

from torch import nn

from compacter_kernels.inject.target_adapters import TargetAdapters
from compacter_kernels.inject.trained_copies import TrainedCopies
from compacter_kernels.targets.added import NAME, Added, AddedModules, adapters_of, added_modules
from compacter_kernels.targets.wrappers import unwrapped


def check_name(name: str, existing: Container[str] = ()) -> None:
    """Check that new adapters can have this name."""
    plain = isinstance(name, str) and name.isidentifier() and not name.startswith("_")
    if not plain or any(hasattr(kind, name) for kind in (TargetAdapters, TrainedCopies, nn.Module())):
        raise ValueError(
            f"name must be a plain name of an adapter, such as 'default', and none that modules of torch use "
            f"themselves; got {name!r}"
        )
    if name in existing:
        raise ValueError(f"the model has adapters of the name {name!r} already; give another name=, or remove them")


def check_child_names(model: nn.Module, paths: Iterable[str]) -> None:
    """Check that neither the model nor these modules have their own child named `compacter`."""
    for path in ("", *paths):
        if not isinstance(getattr(unwrapped(model.get_submodule(path)), NAME, None), Added | None):
            child = f"{path}.{NAME}" if path else NAME
            raise ValueError(f"the model has a {child} of its own, the name under which adapters go; rename it")


def check_nested(model: nn.Module) -> None:
    """Check that no part of the model, and no model that it is part of, has its own adapters."""
    existing = adapters_of(model)
    inside = [(name.rpartition(".")[0], part) for name, part in model.named_modules() if isinstance(part, Added)]
    for path, part in inside:
        if not isinstance(part, AddedModules) and part is not existing:
            raise ValueError(
                f"{path} has adapters of its own, as inject was called for it alone: go on with inject(model.{path}, "
                f"name=...), or call remove_adapters(model.{path}) first"
            )
    if existing is None and inside:
        raise ValueError(
            f"{inside[0][0] or 'it'} has adapters already, of a model that this {type(model).__name__} is part of: go "
            "on with that one, or call remove_adapters for it first"
        )


def check_adapted_or_copied(model: nn.Module, adapted: Sequence[str], copied: Sequence[str]) -> None:
    """Check that no module has both an adapter and a trained copy, of this name or of another."""
    for path, write in itertools.product(copied, adapted):
        if f"{write}.".startswith(f"{path}."):
            raise ValueError(
                f"{path} holds {write}, which gets an adapter, and cannot be trained whole: see modules_to_save"
            )
    for paths, kind, other in ((adapted, TargetAdapters, "trained copies"), (copied, TrainedCopies, "adapters")):
        for path in paths:
            modules = added_modules(unwrapped(model.get_submodule(path)))
            if modules is not None and not isinstance(modules, kind):
                raise ValueError(f"{path} has {other} already ({', '.join(modules)}); it cannot have both")
