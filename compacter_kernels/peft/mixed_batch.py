"""Batches whose samples have different adapters, by the argument adapter_names of peft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from compacter_kernels.nn.choice import Choice, Chooser, Chosen, copied, grouped

BASE = "__base__"  # The name of a sample that has no adapter.


class Names(Choice):
    """The name of the adapter of each sample of a call.

    Args:
        names: the argument adapter_names.
        repeats: how often generate() repeats each sample, for its beams or its sequences.
        device: where the model computes.
    """

    def __init__(self, names: Sequence[str], repeats: int, device: torch.device) -> None:
        occur = tuple(dict.fromkeys(name for name in names if name != BASE))
        numbers = [-1 if name == BASE else occur.index(name) for name in names]
        super().__init__(occur, torch.tensor(numbers, dtype=torch.int64).to(device), repeats=repeats)

    def wrong_length(self, given: int, rows: int) -> str:
        """What peft says."""
        return (
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{given} and {rows} respectively."
        )


@contextmanager
def given_names(model: nn.Module, names: Names) -> Iterator[None]:
    """A context in which the layers and the modules that are trained whole get the names."""
    holders = [module for module in model.modules() if isinstance(module, Chooser)]
    if any(holder.chosen_adapters is not None for holder in holders):
        raise RuntimeError("adapter_names: the model is in a context of route or mix already; leave it first")
    try:
        for holder in holders:
            holder.choose_adapters(names)
        yield
    finally:
        for holder in holders:
            holder.choose_adapters(None)


class ChoosesCopies(Chooser):
    """A tuner of peft, which gives the choice to the modules that are trained whole."""

    holds_adapters, chooses_for_peft = False, True
    _handles: tuple[Any, ...] = ()

    def _wrappers(self) -> list[Any]:
        return [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]  # type: ignore[attr-defined]

    def held_adapters(self) -> Mapping[str, Any]:
        """The names that a trained copy has."""
        return {name: wrapper for wrapper in self._wrappers() for name in wrapper.modules_to_save}

    def choose_adapters(self, choice: Choice | None) -> None:
        """Let the trained copies compute with this choice, or as before."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.chosen_adapters = (), None
        if choice is not None:
            self.chosen_adapters = Chosen(choice, ())
            self._handles = tuple(
                wrapper.register_forward_hook(partial(_call_copies, choice), with_kwargs=True)
                for wrapper in self._wrappers()
            )


def _call_copies(choice: Choice, wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The output of a module that is trained whole, with the copy of each sample's adapter.

    peft itself does this for some classes only, which no layer norm belongs to.
    """
    if wrapper.disable_adapters:
        return output
    if len(args) != 1 or kwargs:
        kind = type(wrapper.original_module).__name__
        raise TypeError(f"adapter_names: a {kind} that is trained whole must take a single tensor, by position")
    copies, (x,) = wrapper.modules_to_save, args
    chosen = Chosen(choice, grouped(choice, copies, str))

    def call(name: str, rows: Tensor) -> Tensor:
        result: Tensor = copies[name](rows)
        return result

    return copied(chosen, x, wrapper.original_module(x), call)
