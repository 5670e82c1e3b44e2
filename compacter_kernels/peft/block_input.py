"""What an adapter takes, where it is not the output of the module that it follows."""

from __future__ import annotations

import functools
import itertools
import threading
from typing import Any

from torch import Tensor, nn

from compacter_kernels.inject.hidden_states import first_argument, first_input

# `waiting` holds the input of the block that this thread computes, and the number of the layer at
# its end. Each thread has its own. torch.compile loses the attributes of a subclass of
# threading.local.
_block_input = threading.local()
numbers = itertools.count()  # Of the layers.


def _keep(number: int, first: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _block_input.waiting = (number, first_input(module, args, kwargs, first))


class BlockInput:
    """A parallel adapter takes the input of a module before, and adds to the output of its own.

    The input is kept from the one call to the other. The hook that keeps it knows no more than a
    number, so that peft can copy the module with its hooks, as it does for a trained layer norm.

    Args:
        read: the module that takes the input. It may be the base layer of `layer`.
        layer: the `AdapterLayer` that has the adapter.
    """

    def __init__(self, read: nn.Module, layer: Any) -> None:
        self._read, self._number = read, layer.number
        self._first = first_argument(read)
        self._own = read is layer.get_base_layer()  # torch.compile cannot look at the handle for this.
        self._handle: Any = None
        if not self._own:
            keep = functools.partial(_keep, self._number, self._first)
            self._handle = read.register_forward_pre_hook(keep, with_kwargs=True)

    def kept(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The input of the block whose last module, the layer, gets these arguments.

        RuntimeError: `read` was not called before it.
        """
        if self._own:
            return first_input(self._read, args, kwargs, self._first)
        waiting: tuple[int, Tensor] | None = getattr(_block_input, "waiting", None)
        if waiting is None or waiting[0] != self._number:
            raise RuntimeError(
                f"an adapter takes the input of a {type(self._read).__name__}, which was not called before the module "
                "that ends its block"
            )
        return waiting[1]

    def __call__(self, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the adapter takes and what it adds to.

        y: the output of the layer's module for these arguments.
        """
        return self.kept(args, kwargs), y

    @property
    def module(self) -> nn.Module:
        """The module whose input is kept."""
        return self._read

    @property
    def key(self) -> Any:
        """Equal for adapters of one layer that take the same and add to the same."""
        return type(self), self._read

    def remove(self) -> None:
        """Stop keeping the input."""
        if self._handle is not None:
            self._handle.remove()


class BlockOutput(BlockInput):
    """An adapter takes the output of a block plus its residual, and the layer norm of the sum.

    It is the original_ln_before of the `adapters` library.

    Args:
        read: the module whose input is the residual.
        layer: the `AdapterLayer` that has the adapter.
        norm: the parent and the name of the layer norm, which may become a trained copy; None if
            none follows.
        before_norm: add to the output of the block; otherwise to what the adapter takes.
    """

    def __init__(self, read: nn.Module, layer: Any, norm: tuple[nn.Module, str] | None, before_norm: bool) -> None:
        super().__init__(read, layer)
        self._norm, self._before_norm = norm, before_norm

    def __call__(self, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the adapter takes and what it adds to, as `BlockInput` gives it."""
        x = y + self.kept(args, kwargs)
        if self._norm is not None:
            parent, name = self._norm
            x = parent.get_submodule(name)(x)
        return x, y if self._before_norm else x

    @property
    def key(self) -> Any:
        """Equal for adapters of one layer that take the same and add to the same."""
        return *super().key, self._norm, self._before_norm


def forget() -> None:
    """Drop the input of the block that this thread has computed."""
    _block_input.waiting = None
