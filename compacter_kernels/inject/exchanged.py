"""Finds adapters and trained copies whose module was exchanged for another one since `inject`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from torch import nn

from compacter_kernels.inject.trained_copies import TrainedCopies
from compacter_kernels.targets.added import AddedModules, added_modules
from compacter_kernels.targets.wrappers import unwrapped

# The watched heads by path, without wrappers: the parent of the head, and the copies of the head.
Heads = dict[str, tuple[nn.Module, TrainedCopies]]
SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim")


def exchanged_modules(model: nn.Module, added: Mapping[str, AddedModules], name: str) -> Iterator[str]:
    """The paths where a module had an adapter or copy of that name, and another module is now.

    added: the modules that `inject` added, by path. A path that the model no longer has is left
    out.
    """
    present = {id(module) for module in model.modules()}
    for path, modules in added.items():
        if name in modules and id(modules) not in present:
            try:
                current = added_modules(unwrapped(model.get_submodule(path)))
            except AttributeError:  # The layer was taken out.
                continue
            if current is None or name not in current:
                yield path


def warn_of_changed_heads(model: nn.Module, heads: Heads, added: Mapping[str, AddedModules], name: str) -> None:
    """Warn of heads with a trained copy of that name that were exchanged or resized since.

    Such a head is removed from `heads`, so that each warning comes once.
    """
    for path, (parent, copies) in list(heads.items()):
        trained, original = copies._modules.get(name), copies.original_module
        current = parent._modules.get(path.rpartition(".")[2])
        if trained is None:
            continue
        if current is None or unwrapped(current) is not original:
            exchanged = path in exchanged_modules(model, added, name)  # Else something wraps and calls it.
            change = "exchanged: its trained copy is used no more" if exchanged else ""
        elif any(vars(original).get(size) != vars(trained).get(size) for size in SIZES):
            change = "resized, and its trained copy, which is used in its place, was not"
        else:
            continue
        del heads[path]
        if change:
            advice = "Call resize_token_embeddings, or exchange a head, before inject"
            warnings.warn(f"{path} was {change}. {advice}", stacklevel=2)
