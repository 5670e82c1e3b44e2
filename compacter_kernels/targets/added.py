"""The types of the modules that `inject` adds to a model, by which they are recognised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compacter_kernels.config import CompacterConfig
from compacter_kernels.nn.choice import Chooser

NAME = "compacter"  # The name of the child that `inject` adds to the model and to each adapted module.


class Added:
    """The type of every module that `inject` adds as a child named `compacter`."""

    def forward(self, x: Any) -> Any:
        """Return the input. An nn.Sequential calls all its children, so also this one."""
        return x


class AddedModules(Added, Chooser, nn.ModuleDict):
    """The child `compacter` of a module of the base: its adapters or its trained copies, by name.

    As a child it moves, trains, shards and is copied together with the module, and the parameters
    of the base keep their names. `active` is the name in use; with None the module computes as
    before.
    """

    active: str | None = None

    def held_adapters(self) -> Mapping[str, Any]:
        """The modules by name."""
        return self._modules

    def in_use(self) -> Any:
        """The module of the active name, or None."""
        return self._modules.get(self.active) if self.active is not None else None


def added_modules(module: nn.Module) -> AddedModules | None:
    """The modules that `inject` has added beside a module, or None."""
    child = module._modules.get(NAME)
    return child if isinstance(child, AddedModules) else None


class Adapters(Added):
    """The child `compacter` of an adapted model, as code outside of `inject` sees it."""

    configs: dict[str, CompacterConfig]  # By the name of the adapters.
    active: str | None  # The name in use.

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The tensors of the adapters of that name, by their names in a file."""
        raise NotImplementedError


def adapters_of(model: nn.Module | None) -> Adapters | None:
    """The adapters of a model that has no wrapper around it, or None."""
    child = getattr(model, NAME, None)
    return child if isinstance(child, Adapters) else None
