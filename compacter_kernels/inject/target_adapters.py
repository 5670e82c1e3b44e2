"""What stands beside a module of the base: its named adapters, or its named trained copies.

A slot is the child `compacter` of the base's module, so that it moves, trains, shards and is copied with it, while the
base's own parameters keep their names. `active` names the adapter in use; with None the module is as it was.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from compacter_kernels.inject.hidden_states import first_input, first_output, first_parameter, with_output
from compacter_kernels.inject.offload import in_place
from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.targets.added import NAME, Added
from compacter_kernels.targets.layer import Layer

REPLICATED = (
    "nn.DataParallel runs copies of a module, which would use adapters on another device; use one process for each "
    "device instead, with DistributedDataParallel: torchrun --nproc-per-node=N"
)
REPLACED = (
    "a {now} stands in place of the {before} that an adapter was put behind, and the adapter is no part of the model "
    "any more; quantise (quantize_dynamic, for inference) or exchange layers first, then inject or load_adapter"
)


class AddedModules(Added, nn.ModuleDict):
    """The modules of one place, by the name of the adapter that they belong to."""

    active: str | None = None

    def in_use(self) -> Any:
        """The module of the active adapter, or None."""
        return self._modules.get(self.active) if self.active is not None else None

    def detach(self) -> None:
        """Leave the base's module as it was."""
        raise NotImplementedError


def added_modules(module: nn.Module) -> AddedModules | None:
    """What stands beside a module already."""
    found = module._modules.get(NAME)
    return found if isinstance(found, AddedModules) else None


# `waiting`: the slot between whose two modules this thread computes, and the input that its parallel adapter waits for,
# which stays until the next call of one. On no module, so that calls of several threads stay apart and models can be
# copied after a call that was interrupted. No subclass of threading.local: torch.compile loses what is set on such.
_in_flight = threading.local()


class TargetAdapters(AddedModules):
    """Adapters behind a module: y = adapter(y), or y + adapter(x) with the block's input x where it is parallel.

    write: the layer whose output they take, a tensor or what begins with one. The slot stands beside the layer itself,
    whatever is around it.
    """

    def __init__(self, write: Layer) -> None:
        super().__init__()
        self._write = write
        self._reads: dict[str, tuple[Layer, str]] = {}
        self._owners: dict[str, tuple[nn.Module, ...]] = {}
        self._handles: list[tuple[nn.Module, Any]] = []
        setattr(write.module, NAME, self)
        self.register_hooks()

    def add_adapter(self, name: str, adapter: CompacterAdapter, read: Layer, shared: nn.Module | None) -> None:
        """Take an adapter in. read: the layer whose input a parallel one takes. shared: whose weights it borrows."""
        self[name] = adapter
        self._owners[name] = () if shared is None else (shared,)
        if not adapter.add_residual:
            self._reads[name] = (read, first_parameter(read.module))
            self.register_hooks()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self._owners[name]
        self._reads.pop(name, None)

    def register_hooks(self) -> None:
        """Register the hooks that are not there."""
        if not self._handles:
            for module in self._write.parts:
                self._handles.append((module, module.register_forward_hook(self._after, with_kwargs=True)))
        for part in (part for read, _ in self._reads.values() for part in read.parts):
            if all(part is not module for module, _ in self._handles):
                self._handles.append((part, part.register_forward_pre_hook(self._before, with_kwargs=True)))

    def remove_hooks(self) -> None:
        """Take the hooks off."""
        for _, handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if self.active in self._reads:
            read, first = self._reads[self.active]
            if module in read.parts and read.is_outer_call(module, "LoraLayer"):
                _in_flight.waiting = (self, first_input(module, args, kwargs or {}, first))

    def _after(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """rest: the inputs by keyword, and the output; torch.ao registers the hook anew without the former."""
        adapter: CompacterAdapter | None = self.in_use()
        if adapter is None or not self._write.is_outer_call(module):
            return rest[-1]
        if module not in self._write.parts:
            now, before = (f"{kind.__module__}.{kind.__name__}" for kind in (type(module), type(self._write.module)))
            raise RuntimeError(REPLICATED if NAME in module._modules else REPLACED.format(now=now, before=before))
        kwargs, output = rest
        y = first_output(module, output)
        with in_place(self._owners[self.active]):  # type: ignore[index]
            y = adapter(y) if adapter.add_residual else adapter(self._input(module, args, kwargs), y)
        return with_output(output, y)

    def _input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the block that ends in this module got."""
        read, first = self._reads[self.active]  # type: ignore[index]
        if read.module is self._write.module:
            return first_input(module, args, kwargs, first)
        waiting: tuple[TargetAdapters, Tensor] | None = getattr(_in_flight, "waiting", None)
        _in_flight.waiting = None
        if waiting is None or waiting[0] is not self:
            raise RuntimeError(
                f"a parallel adapter takes the input of a {type(read.module).__name__}, which was not called before "
                f"the {type(module).__name__} that ends its block"
            )
        return waiting[1]

    def detach(self) -> None:
        """Leave the base's module as it was."""
        self.remove_hooks()
        delattr(self._write.module, NAME)
