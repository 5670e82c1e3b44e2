"""Batches whose samples have different adapters, by the argument adapter_names of peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

BASE = "__base__"  # The name of a sample that has no adapter.


class Names:
    """The name of the adapter of each sample of a call.

    Args:
        names: the argument adapter_names.
        repeats: how often generate() repeats each sample, for its beams or its sequences.
    """

    def __init__(self, names: Sequence[str], repeats: int = 1) -> None:
        self._names, self._repeats = list(names), repeats

    def change(self, y: Tensor, having: nn.ModuleDict, compute: Callable[[str, Tensor], Tensor]) -> Tensor:
        """y (samples, ...) with compute(name, rows) for the samples of each name that is in having.

        ValueError: there is not a name for each sample.
        """
        names = self._names
        if len(y) != len(names):  # generate() calls the encoder before it repeats the samples.
            names = [name for name in names for _ in range(self._repeats)]
        if len(y) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self._names)} and {len(y)} respectively."
            )
        result = y
        for name in dict.fromkeys(names):
            if name in having:
                rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=y.device)
                result = result.index_copy(0, rows, compute(name, rows).to(y.dtype))
        return result


@contextmanager
def given_names(model: nn.Module, layer_class: type[nn.Module], names: Names) -> Iterator[None]:
    """A context in which the layers and the modules that are trained whole get the names."""

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, layer_class):
            handles.append(module.register_forward_pre_hook(give, with_kwargs=True))
        elif isinstance(module, ModulesToSaveWrapper):
            handles.append(module.register_forward_hook(partial(_call_copies, names), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call_copies(names: Names, wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The output of a module that is trained whole, with the copy of each sample's adapter.

    peft itself does this for some classes only, which no layer norm belongs to.
    """
    if wrapper.disable_adapters:
        return output
    if len(args) != 1 or kwargs:
        kind = type(wrapper.original_module).__name__
        raise TypeError(f"adapter_names: a {kind} that is trained whole must take a single tensor, by position")
    copies, (x,) = wrapper.modules_to_save, args
    return names.change(wrapper.original_module(x), copies, lambda name, rows: copies[name](x[rows]))
