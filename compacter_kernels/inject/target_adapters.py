"""The adapters that follow one module of the base."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from compacter_kernels.inject.hidden_states import first_argument, first_input, map_first
from compacter_kernels.inject.offload import onloaded
from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.nn.choice import Choice, Part, adapted, check_inputs
from compacter_kernels.targets.added import NAME, AddedModules
from compacter_kernels.targets.fast_path import FastPath
from compacter_kernels.targets.wrappers import is_a, unwrapped, wrapper_chain

REPLICATED = (
    "nn.DataParallel runs copies of a module, which would use adapters on another device; use one process for each "
    "device instead, with DistributedDataParallel: torchrun --nproc-per-node=N"
)
REPLACED = (
    "a {now} stands in place of the {before} that an adapter was put behind, and the adapter is no part of the model "
    "any more; quantise (quantize_dynamic, for inference) or exchange layers first, then inject or load_adapter"
)
WRAPPED_LATER = (
    "peft has wrapped {name}, a layer whose output or input Compacter adapters take: they would miss what peft does "
    "there, and merging would change the outputs. Call get_peft_model first and inject into the model that it returns, "
    "or leave this layer out of peft's target_modules; peft's unload() undoes it"
)

# `waiting` holds the input of the block that this thread computes, and the TargetAdapters at the
# end of the block. Each thread has its own. No module holds it, so that a model can be copied after
# a call that was interrupted. torch.compile loses the attributes of a subclass of threading.local.
_block_input = threading.local()


class Layer:
    """A layer that adapters hook, together with the wrapper that peft has put around it.

    The adapters use the input and the output of the wrapper. When peft merges or unloads, it
    removes its wrapper, and the adapters then use those of the layer itself. So both are hooked,
    and each call checks which of the two the model holds.

    module: the layer itself, inside its wrappers. parts: the modules to hook, which are peft's
    wrapper, if there is one, and the layer.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        parent, _, self._name = path.rpartition(".")
        self._parent, outer = model.get_submodule(parent), model.get_submodule(path)
        self.module = unwrapped(outer)
        wrapper = _peft_wrapper(outer, self.module)
        self.parts = (self.module,) if wrapper is None else (wrapper, self.module)

    def is_outer_call(self, module: nn.Module, *allowed: str) -> bool:
        """Whether a call of this part is a call of the whole layer, and not one by peft's wrapper.

        allowed: classes of peft wrappers that may have been added after this object was made. Any
        other that was added raises RuntimeError.
        """
        outer = self._parent._modules.get(self._name)
        if outer is module or outer is None:
            return True
        wrapper = _peft_wrapper(outer, module)
        if wrapper is None or wrapper in self.parts:
            return wrapper is None
        if is_a(wrapper, *allowed):
            return True
        raise RuntimeError(WRAPPED_LATER.format(name=self._name))


def _peft_wrapper(outer: nn.Module, layer: nn.Module) -> nn.Module | None:
    """The wrapper of peft directly around a layer, among all wrappers in `outer`, or None."""
    for module in wrapper_chain(outer):
        if module is not layer and is_a(module, "BaseTunerLayer"):
            return module if unwrapped(module) is layer else None
    return None


class TargetAdapters(AddedModules):
    """The adapters behind a target: y = adapter(y), or y + adapter(x) for a parallel one.

    x is the input of the block that ends with the target, `write`, and y the output of the target.
    y may also be the first element of the output. With original_ln_before an adapter takes y + x,
    where x is the residual of the block, or the layer norm of this sum. The adapters are a child of
    the layer itself, inside its wrappers.
    """

    def __init__(self, write: Layer) -> None:
        super().__init__()
        self._write = write
        self._reads: dict[str, tuple[Layer, str]] = {}
        self._norms: dict[str, Layer] = {}
        self._before_norm: dict[str, bool] = {}
        self._owners: dict[str, tuple[nn.Module, ...]] = {}
        self._handles: list[tuple[nn.Module, Any]] = []
        setattr(write.module, NAME, self)
        self.register_hooks()

    def add_adapter(
        self,
        name: str,
        adapter: CompacterAdapter,
        shared: nn.Module | None,
        *,
        read: Layer | None = None,
        norm: Layer | None = None,
        before_norm: bool = True,
    ) -> None:
        """Add an adapter, which borrows from `shared`.

        read: the module that has x as its input, if the adapter needs it. norm: the layer norm of
        the sum. before_norm: add to y; otherwise to what the adapter takes.
        """
        self[name] = adapter
        self._owners[name] = () if shared is None else (shared,)
        self._before_norm[name] = before_norm
        if norm is not None:
            self._norms[name] = norm
        if read is not None:
            self._reads[name] = (read, first_argument(read.module))
            self.register_hooks()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self._owners[name]
        self._reads.pop(name, None)
        self._norms.pop(name, None)

    def register_hooks(self) -> None:
        """Register the hooks that are missing."""
        if not self._handles:
            for part in self._write.parts:
                self._handles.append((part, part.register_forward_hook(self._after, with_kwargs=True)))
        for part in (part for read, _ in self._reads.values() for part in read.parts):
            if all(part is not module for module, _ in self._handles):
                self._handles.append((part, part.register_forward_pre_hook(self._before, with_kwargs=True)))

    def remove_hooks(self) -> None:
        """Remove all hooks."""
        for _, handle in self._handles:
            handle.remove()
        self._handles.clear()

    def input_key(self, name: str) -> Any:
        """What tells apart adapters of different inputs."""
        read, norm = self._reads.get(name), self._norms.get(name)
        parts = [None if layer is None else layer.module for layer in (read and read[0], norm)]
        return parts, self._before_norm[name]

    def parts_of(self, choice: Choice) -> tuple[Part, ...]:
        """The adapters that occur here; ValueError if they take the inputs of different modules."""
        check_inputs(choice, {name: read.module for name, (read, _) in self._reads.items()})
        return super().parts_of(choice)

    def _in_use(self) -> tuple[str, ...]:
        """The names of the adapters that compute."""
        if self.active is None:
            return ()
        if self.chosen_adapters is not None:
            return tuple(name for part in self.chosen_adapters.parts for name in part.names)
        return (self.active,) if self.active in self else ()

    def _names_of_call(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the adapters that compute in a call of the target by this hooked module."""
        names = self._in_use()
        if not names or not self._write.is_outer_call(module):
            return ()
        if module not in self._write.parts:
            now, before = (f"{kind.__module__}.{kind.__name__}" for kind in (type(module), type(self._write.module)))
            raise RuntimeError(REPLICATED if NAME in module._modules else REPLACED.format(now=now, before=before))
        return names

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        name = next((name for name in self._in_use() if name in self._reads), None)
        if name is not None:
            read, first = self._reads[name]
            if module in read.parts and read.is_outer_call(module, "LoraLayer"):
                _block_input.waiting = (self, first_input(module, args, kwargs or {}, first))

    def _after(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """Apply the active adapter to the output, the last of `rest`, after the keyword arguments.

        torch.ao registers the hook again in such a way that the keyword arguments are missing.
        """
        names = self._names_of_call(module)
        if not names:
            return rest[-1]
        kwargs, output = rest
        if self.chosen_adapters is None and names[0] not in self._reads:  # the usual case, in the least time
            with onloaded(self._owners[names[0]]):
                return map_first(self[names[0]], output, module)
        x = self._input(names, module, args, kwargs)

        def inputs_of(name: str, y: Tensor) -> tuple[Tensor, Tensor]:
            return self._inputs_of(name, y, x)

        def change(y: Tensor) -> Tensor:
            if self.chosen_adapters is not None:
                return adapted(self.chosen_adapters, self, y, inputs_of)
            return self[names[0]](*inputs_of(names[0], y))  # type: ignore[no-any-return]

        with onloaded([owner for name in names for owner in self._owners[name]]):
            return map_first(change, output, module)

    def _inputs_of(self, name: str, y: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """What an adapter takes and what it adds to, from the output and the block's input."""
        adapter: Any = self[name]
        if name not in self._reads:
            return y, y
        assert x is not None
        if not adapter.add_residual:
            return x, y
        x = y + x
        norm = self._norms.get(name)
        x = x if norm is None else norm.module(x)
        return x, y if self._before_norm[name] else x

    def _input(
        self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The input of the block that ends with this module, if one of the adapters needs it."""
        name = next((name for name in names if name in self._reads), None)
        if name is None:
            return None
        read, first = self._reads[name]
        if read.module is self._write.module:
            return first_input(module, args, kwargs, first)
        waiting: tuple[TargetAdapters, Tensor] | None = getattr(_block_input, "waiting", None)
        _block_input.waiting = None
        if waiting is None or waiting[0] is not self:
            raise RuntimeError(
                f"an adapter takes the input of a {type(read.module).__name__}, which was not called before "
                f"the {type(module).__name__} that ends its block"
            )
        return waiting[1]

    def detach(self) -> None:
        """Remove the hooks and the child `compacter` of the target."""
        self.remove_hooks()
        delattr(self._write.module, NAME)


class AdapterFastPath(FastPath):
    """The fast path of the torch encoders in a model that hold adapters or trained copies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, AddedModules)
        parts = dict.fromkeys(part for module in self.encoders for part in module.modules())
        self._adapters = [part for part in parts if isinstance(part, TargetAdapters)]

    def allow(self, on: bool, asker: object = None) -> None:
        """Restore the fast path, or switch it off. The adapters have hooks only while it is off."""
        super().allow(on, asker)
        for adapters in self._adapters:
            adapters.remove_hooks() if on else adapters.register_hooks()
