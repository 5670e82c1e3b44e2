"""The adapters of embeddings, before the first layer of a stack."""

from __future__ import annotations

from typing import Any

from compacter_kernels.inject.hidden_states import first_argument, first_input
from compacter_kernels.inject.offload import onloaded
from compacter_kernels.inject.target_adapters import Layer, TargetAdapters
from compacter_kernels.nn.choice import adapted


class EmbeddingAdapters(TargetAdapters):
    """The adapters before a layer: x = adapter(x), where x is the first argument of the layer.

    They are a child of the layer, inside its wrappers.
    """

    def __init__(self, write: Layer) -> None:
        super().__init__(write)
        self._first = first_argument(write.module)

    def register_hooks(self) -> None:
        """Register the hooks that are missing."""
        if not self._handles:
            for part in self._write.parts:
                self._handles.append((part, part.register_forward_pre_hook(self._change_input, with_kwargs=True)))

    def _change_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of the call, of which the first went through the active adapter."""
        names = self._names_of_call(module)
        if not names:
            return None
        x = first_input(module, args, kwargs, self._first)
        if not x.is_floating_point():
            raise TypeError(f"an embedding adapter takes hidden states; a {type(module).__name__} got {x.dtype}")
        with onloaded([owner for name in names for owner in self._owners[name]]):
            if self.chosen_adapters is not None:
                x = adapted(self.chosen_adapters, self, x, lambda name, y: (y, y))
            else:
                x = self[names[0]](x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, self._first: x})
