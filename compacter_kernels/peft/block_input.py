"""The input of a block, for the parallel adapter at the end of the block."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from torch import Tensor, nn

from compacter_kernels.inject.hidden_states import first_input

# `waiting` holds the input of the block that this thread computes, and the layer at its end. Each
# thread has its own. torch.compile loses the attributes of a subclass of threading.local.
_block_input = threading.local()


class BlockInput:
    """The input of a block, kept from the call of its first module to that of its last one.

    read: the module that takes the input. layer: the last module, an `AdapterLayer`.
    """

    def __init__(self, read: nn.Module, layer: Any) -> None:
        self._read, self._layer = read, layer
        self._first = next(iter(inspect.signature(read.forward).parameters), "")
        self._is_own = read is layer.get_base_layer()  # torch.compile cannot look at the handle for this.
        self._handle = None if self._is_own else read.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._layer.disable_adapters:
            _block_input.waiting = (self._layer, first_input(module, args, kwargs, self._first))

    def of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The input of the block whose last module, the layer, gets these arguments.

        RuntimeError: `read` was not called before it.
        """
        if self._is_own:
            return first_input(self._read, args, kwargs, self._first)
        waiting: tuple[nn.Module, Tensor] | None = getattr(_block_input, "waiting", None)
        if waiting is None or waiting[0] is not self._layer:
            raise RuntimeError(
                f"a parallel adapter takes the input of a {type(self._read).__name__}, which was not called before "
                "the module that ends its block"
            )
        return waiting[1]

    def remove(self) -> None:
        """Stop keeping the input."""
        if self._handle is not None:
            self._handle.remove()


def forget() -> None:
    """Drop the input of the block that this thread has computed."""
    _block_input.waiting = None
