"""A layer that adapters hook, together with the wrapper that peft has put around it.

The adapters use the input and the output of the wrapper. When peft merges or unloads, it removes
its wrapper, and the adapters then use those of the layer itself. So both are hooked, and each call
checks which of the two the model holds.
"""

from __future__ import annotations

from torch import nn

from compacter_kernels.targets.wrappers import is_a, unwrapped, wrapper_chain

WRAPPED_LATER = (
    "peft has wrapped {name}, a layer whose output or input Compacter adapters take: they would miss what peft does "
    "there, and merging would change the outputs. Call get_peft_model first and inject into the model that it returns, "
    "or leave this layer out of peft's target_modules; peft's unload() undoes it"
)


class Layer:
    """The layer of that name in a model.

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

        allowed: classes of peft wrappers that may have been added after this object was made.

        Raises:
            RuntimeError: another peft wrapper was put around the layer since.
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
