"""What stands beside a module of the base: its named adapters, or its named trained copies.

A slot is the child `compacter` of the base's module, so that it moves, trains, shards and is copied with it, while the
base's own parameters keep their names. `active` names the adapter in use; with None the module is as it was.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from compacter_kernels.nn import CompacterAdapter

NAME = "compacter"


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
    """

    def __init__(self, write: nn.Module, read: nn.Module) -> None:
        super().__init__()
        self._x: Tensor | None = None
        self._write = (write,)  # in a tuple, so that it is no child
        self._handles = [read.register_forward_pre_hook(self._before), write.register_forward_hook(self._after)]
        setattr(write, NAME, self)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        adapter = self.in_use()
        if adapter is not None and not adapter.add_residual:
            self._x = inputs[0]

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        adapter: CompacterAdapter | None = self.in_use()
        if adapter is None:
            return output
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
        return copy.deepcopy(base).requires_grad_(True)
    finally:
        if forward is not None:
            base.forward = forward
        if slot is not None:
            setattr(base, NAME, slot)
