"""Adapters and copies that are no part of their model any more, since the modules they stood beside were exchanged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from compacter_kernels.inject.target_adapters import AddedModules, added_modules
from compacter_kernels.inject.trained_copies import TrainedCopies
from compacter_kernels.targets.wrappers import unwrapped

SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim")


def exchanged_modules(model: nn.Module, placed: Mapping[str, AddedModules], name: str) -> Iterator[str]:
    """Names of the modules that had an adapter or a copy of that name, in whose place stand others without one."""
    present = {id(module) for module in model.modules()}
    for path, slot in placed.items():
        if name in slot and id(slot) not in present:
            try:
                now = added_modules(unwrapped(model.get_submodule(path)))
            except AttributeError:  # a layer that was taken out
                continue
            if now is None or name not in now:
                yield path


class HeadWatch:
    """Says once that a head was exchanged or resized after `inject`, in whose place its trained copy stood."""

    def __init__(self) -> None:
        self._heads: list[tuple[str, nn.Module, str, TrainedCopies]] = []

    def __len__(self) -> int:
        return len(self._heads)

    def add(self, path: str, parent: nn.Module, slot: TrainedCopies) -> None:
        """HeadWatch the module of that name, a child of that parent."""
        if all(slot is not other for *_, other in self._heads):
            self._heads.append((path, parent, path.rpartition(".")[2], slot))

    def look(self, model: nn.Module, placed: Mapping[str, AddedModules], name: str) -> None:
        """Warn of what has become of the copies of that name."""
        if torch.compiler.is_compiling():
            return
        for head in list(self._heads):
            path, parent, child, slot = head
            trained = slot._modules.get(name)
            if trained is None:
                continue
            base = slot.original_module
            what = None
            now = parent._modules.get(child)
            if now is None or unwrapped(now) is not base:
                self._heads.remove(head)  # said now, or wrapped by something and called through it
                if path in exchanged_modules(model, placed, name):
                    what = "exchanged: its trained copy is used no more"
            elif any(vars(base).get(size) != vars(trained).get(size) for size in SIZES):
                self._heads.remove(head)
                what = "resized, and its trained copy, which is used in its place, was not"
            if what is not None:
                warnings.warn(
                    f"{path} was {what}. Call resize_token_embeddings, or exchange a head, before inject", stacklevel=2
                )
