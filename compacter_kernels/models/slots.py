"""What stands beside a module of the base: its named adapters, or its named trained copies.

A slot is the child `compacter` of the base's module, so that it moves, trains, shards and is copied with it, while the
base's own parameters keep their names. `active` names the adapter in use; with None the module is as it was.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from compacter_kernels.models.hidden_states import first_input, first_output, first_parameter, with_output
from compacter_kernels.models.offload import in_place
from compacter_kernels.models.wrappers import peft_layer, unwrapped
from compacter_kernels.nn import CompacterAdapter

NAME = "compacter"
REPLICATED = (
    "nn.DataParallel runs copies of a module, which would use adapters on another device; use one process for each "
    "device instead, with DistributedDataParallel: torchrun --nproc-per-node=N"
)
REPLACED = (
    "a {now} stands in place of the {before} that an adapter was put behind, and the adapter is no part of the model "
    "any more; quantise (quantize_dynamic, for inference) or exchange layers first, then inject or load_adapter"
)
WRAPPED_LATER = (
    "peft has wrapped {child}, a layer that Compacter adapters follow: they would read its output without what peft "
    "adds, and merging would change the outputs. Call get_peft_model first and inject into the model that it returns, "
    "or leave this layer out of peft's target_modules; peft's unload() undoes it"
)


class Added:
    """What `inject` puts into a model, told from modules of the base by this type."""

    def forward(self, x: Any) -> Any:
        """As a step of an nn.Sequential, beside whose modules it stands, it does nothing."""
        return x


class Slot(Added, nn.ModuleDict):
    """The modules of one place, by the name of the adapter that they belong to."""

    active: str | None = None

    def in_use(self) -> Any:
        """The module of the active adapter, or None."""
        return self._modules.get(self.active) if self.active is not None else None

    def detach(self) -> None:
        """Leave the base's module as it was."""
        raise NotImplementedError


def slot_of(module: nn.Module) -> Slot | None:
    """What stands beside a module already."""
    found = module._modules.get(NAME)
    return found if isinstance(found, Slot) else None


# `waiting`: the slot between whose two modules this thread computes, and the input that its parallel adapter waits for,
# which stays until the next call of one. On no module, so that calls of several threads stay apart and models can be
# copied after a call that was interrupted. No subclass of threading.local: torch.compile loses what is set on such.
_in_flight = threading.local()


class AdapterSlot(Slot):
    """Adapters behind a module: y = adapter(y), or y + adapter(x) with the block's input x where it is parallel.

    write: the module whose output they take, a tensor or what begins with one.
    home, child: the module that holds `write`, and under which name.

    The slot stands beside the layer itself, whatever is around it. Of one that peft has wrapped, the adapters take the
    wrapper's output, and that of the layer when peft has merged or unloaded.
    """

    def __init__(self, write: nn.Module, home: nn.Module, child: str) -> None:
        super().__init__()
        layer = unwrapped(write)
        self._write = (layer,)  # in a tuple, so that it is no child
        wrapper = peft_layer(write, layer)
        self._wrapper = () if wrapper is None else (wrapper,)
        self._home = (home, child)
        self._reads: dict[str, tuple[nn.Module, str]] = {}
        self._owners: dict[str, tuple[nn.Module, ...]] = {}
        self._handles: list[tuple[nn.Module, Any]] = []
        setattr(layer, NAME, self)
        self.register_hooks()

    def put_adapter(self, name: str, adapter: CompacterAdapter, read: nn.Module, shared: nn.Module | None) -> None:
        """Take an adapter in. read: the module whose input a parallel one takes. shared: whose weights it borrows."""
        self[name] = adapter
        self._owners[name] = () if shared is None else (shared,)
        if not adapter.add_residual:
            self._reads[name] = (read, first_parameter(read))
            self.register_hooks()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self._owners[name]
        self._reads.pop(name, None)

    def register_hooks(self) -> None:
        """Register the hooks that are not there."""
        if not self._handles:
            for module in (*self._wrapper, *self._write):
                self._handles.append((module, module.register_forward_hook(self._after, with_kwargs=True)))
        for read, _ in self._reads.values():
            if all(read is not module for module, _ in self._handles):
                self._handles.append((read, read.register_forward_pre_hook(self._before, with_kwargs=True)))

    def remove_hooks(self) -> None:
        """Take the hooks off."""
        for _, handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if self.active in self._reads:
            read, first = self._reads[self.active]
            if read is module:
                _in_flight.waiting = (self, first_input(module, args, kwargs or {}, first))

    def _after(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """rest: the inputs by keyword, and the output; torch.ao registers the hook anew without the former."""
        adapter: CompacterAdapter | None = self.in_use()
        if adapter is None:
            return rest[-1]
        home, child = self._home
        outer = home._modules.get(child)
        if outer is not module and outer is not None and (wrapper := peft_layer(outer, module)) is not None:
            if wrapper not in self._wrapper:
                raise RuntimeError(WRAPPED_LATER.format(child=child))
            return rest[-1]  # the wrapper's comes next
        if module is not self._write[0] and module not in self._wrapper:
            now, before = (f"{kind.__module__}.{kind.__name__}" for kind in (type(module), type(self._write[0])))
            raise RuntimeError(REPLICATED if NAME in module._modules else REPLACED.format(now=now, before=before))
        kwargs, output = rest
        y = first_output(module, output)
        with in_place(self._owners[self.active]):  # type: ignore[index]
            y = adapter(y) if adapter.add_residual else adapter(self._input(module, args, kwargs), y)
        return with_output(output, y)

    def _input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the block that ends in this module got."""
        read, first = self._reads[self.active]  # type: ignore[index]
        if read is self._write[0]:
            return first_input(module, args, kwargs, first)
        waiting: tuple[AdapterSlot, Tensor] | None = getattr(_in_flight, "waiting", None)
        _in_flight.waiting = None
        if waiting is None or waiting[0] is not self:
            raise RuntimeError(
                f"a parallel adapter takes the input of a {type(read).__name__}, which was not called before the "
                f"{type(module).__name__} that ends its block"
            )
        return waiting[1]

    def detach(self) -> None:
        """Leave the base's module as it was."""
        self.remove_hooks()
        delattr(self._write[0], NAME)
