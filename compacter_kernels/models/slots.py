"""What stands beside a module of the base: its named adapters, or its named trained copies.

A slot is the child `compacter` of the base's module, so that it moves, trains, shards and is copied with it, while the
base's own parameters keep their names. `active` names the adapter in use; with None the module is as it was.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from compacter_kernels.models.wrappers import base_layer, is_a
from compacter_kernels.nn import CompacterAdapter
from compacter_kernels.nn.partitioned import gathered

NAME = "compacter"
REPLICATED = (
    "nn.DataParallel runs copies of a module, which would use adapters on another device; use one process for each "
    "device instead, with DistributedDataParallel: torchrun --nproc-per-node=N"
)

WRAPPED_LATER = (
    "peft has wrapped {child}, a layer that Compacter adapters follow: they would read its output without what peft "
    "adds, and merging would change the outputs. Call get_peft_model first and inject into the model that it returns, "
    "or leave this layer out of peft's target_modules; peft's unload() undoes it"
)


class Slot(nn.ModuleDict):
    """The modules of one place, by the name of the adapter that they belong to."""

    active: str | None = None

    def in_use(self) -> Any:
        """The module of the active adapter, or None."""
        return self._modules.get(self.active) if self.active is not None else None

    def detach(self) -> None:
        """Leave the base's module as it was."""
        raise NotImplementedError


class AdapterSlot(Slot):
    """Adapters behind a module: y = adapter(y), or y + adapter(x) with the block's input x where it is parallel.

    write: the module whose output they take, a tensor or a tuple that begins with it. read: the one whose input is x.
    home, child: the module that holds `write`, and under which name.

    Of a layer that peft has wrapped, the adapters take the wrapper's output. The slot stands beside the layer itself,
    which is all that is left when peft merges or unloads.
    """

    def __init__(self, write: nn.Module, read: nn.Module, home: nn.Module, child: str) -> None:
        super().__init__()
        self._x: Tensor | None = None
        layer = base_layer(write)
        self._write = (layer,)  # in a tuple, so that it is no child
        self._home = (home, child)
        self._wrapper = (write,) if write is not layer else ()
        self._handles = [base_layer(read).register_forward_pre_hook(self._before)]
        self._handles += [module.register_forward_hook(self._after) for module in (*self._wrapper, layer)]
        setattr(layer, NAME, self)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        adapter = self.in_use()
        if adapter is not None and not adapter.add_residual:
            self._x = inputs[0]

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        adapter: CompacterAdapter | None = self.in_use()
        if adapter is None:
            return output
        home, child = self._home
        outer = home._modules[child]
        if outer is not module and outer is not None and is_a(outer, "BaseTunerLayer") and base_layer(outer) is module:
            if outer not in self._wrapper:
                raise RuntimeError(WRAPPED_LATER.format(child=child))
            return output  # the wrapper's comes next
        if module is not self._write[0] and module not in self._wrapper:
            raise RuntimeError(REPLICATED)
        y = output[0] if isinstance(output, tuple) else output
        if adapter.add_residual:
            y = adapter(y)
        else:
            x, self._x = self._x, None
            y = adapter(x, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def detach(self) -> None:
        """Leave the base's module as it was."""
        for handle in self._handles:
            handle.remove()
        delattr(self._write[0], NAME)


class CopySlot(Slot):
    """Trained copies of a module, which stand in for it; it keeps its own weights."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = (base,)
        self._own_forward = vars(base).get("forward")
        base.forward = self._instead
        setattr(base, NAME, self)

    def _instead(self, *args: Any, **kwargs: Any) -> Any:
        trained = self.in_use()
        if trained is not None:
            return trained(*args, **kwargs)
        if self._own_forward is not None:
            return self._own_forward(*args, **kwargs)
        base = self._base[0]
        return type(base).forward(base, *args, **kwargs)

    def detach(self) -> None:
        """Leave the base's module as it was."""
        base = self._base[0]
        del base.forward
        if self._own_forward is not None:
            base.forward = self._own_forward
        delattr(base, NAME)


def trained_copy(base: nn.Module) -> nn.Module:
    """A copy of a module without what stands beside it, all its parameters trained."""
    slot = base._modules.pop(NAME, None)
    forward = vars(base).pop("forward", None)
    try:
        with gathered(base.parameters()):
            return copy.deepcopy(base).requires_grad_(True)
    finally:
        if forward is not None:
            base.forward = forward
        if slot is not None:
            setattr(base, NAME, slot)
