"""A layer that adapters follow, or whose input they take, and what peft has put around it.

Of a wrapped layer the wrapper's input and output count. peft drops its wrapper when it merges or unloads, and the
layer's own count then; so both are hooked, and which of them stands in the model is asked in each call.
"""

from __future__ import annotations

from torch import nn

from compacter_kernels.targets.wrappers import is_a, unwrapped, wrapper_chain

WRAPPED_LATER = (
    "peft has wrapped {child}, a layer whose output or input Compacter adapters take: they would miss what peft does "
    "there, and merging would change the outputs. Call get_peft_model first and inject into the model that it returns, "
    "or leave this layer out of peft's target_modules; peft's unload() undoes it"
)


class Layer:
    """The layer of that name in a model.

    module: the layer itself, whatever is around it. parts: it, after the wrapper that peft had put around it if any.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        home, _, self._child = path.rpartition(".")
        self._home, outer = model.get_submodule(home), model.get_submodule(path)
        self.module = unwrapped(outer)
        wrapper = _peft_layer(outer, self.module)
        self.parts = (self.module,) if wrapper is None else (wrapper, self.module)

    def is_outer_call(self, module: nn.Module, *harmless: str) -> bool:
        """Whether a call of the module, one of the parts, is not within the call of a wrapper of peft.

        harmless: kinds of wrappers that may have come later.

        Raises:
            RuntimeError: another wrapper was put around the layer since.
        """
        outer = self._home._modules.get(self._child)
        if outer is module or outer is None:
            return True
        wrapper = _peft_layer(outer, module)
        if wrapper is None or wrapper in self.parts:
            return wrapper is None
        if is_a(wrapper, *harmless):
            return True
        raise RuntimeError(WRAPPED_LATER.format(child=self._child))


def _peft_layer(outer: nn.Module, layer: nn.Module) -> nn.Module | None:
    """The layer of peft around a layer, of all that stands in the layer's place; None where there is none."""
    for module in wrapper_chain(outer):
        if module is not layer and is_a(module, "BaseTunerLayer"):
            return module if unwrapped(module) is layer else None
    return None
