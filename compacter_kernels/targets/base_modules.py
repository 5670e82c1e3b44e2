"""The modules of a model's base: which there are, which names end as asked, which are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from compacter_kernels.targets.added import Added

# Attention classes that, like nn.MultiheadAttention, read the weights of their modules and never
# call these modules.
WEIGHT_READERS = ("WavLMAttention",)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base with their names, without the modules that `inject` has added."""
    added = None
    for name, module in model.named_modules():  # The parts of a module follow directly after it.
        if isinstance(module, Added):
            added = f"{name}."
        elif added is None or not name.startswith(added):
            yield name, module


def names_ending_with(model: nn.Module, ends: Sequence[str], option: str, hint: Callable[[], str] = str) -> list[str]:
    """The names of the base's modules that end with one of `ends`, in the order of the model.

    option: the option of the config that holds `ends`, for messages. hint: makes the end of the
    message about missing modules.

    Raises:
        ValueError: no name has one of the ends, or the model never calls one of the modules.
    """
    names = [name for name, _ in base_modules(model)]
    missing = [end for end in ends if not any(f".{name}".endswith(f".{end}") for name in names)]
    if missing:
        raise ValueError(f"{option}: no module's name ends with {', '.join(missing)}{hint()}")
    chosen = [name for name in names if f".{name}".endswith(tuple(f".{end}" for end in ends))]
    for name in chosen:
        if not is_called(model, name):
            attention = name.rpartition(".")[0] or type(model).__name__
            raise ValueError(
                f"{option}: {name} is never called, {attention} reads its weights itself; name the attention, "
                f"{attention.rpartition('.')[2]!r}"
            )
    return chosen


def is_called(model: nn.Module, path: str) -> bool:
    """Whether the model calls this module. Some attention classes only read a module's weights."""
    parts = path.split(".")
    parents = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    return not any(map(_reads_weights, parents))


def _reads_weights(module: nn.Module) -> bool:
    if not isinstance(module, nn.MultiheadAttention):
        return type(module).__name__ in WEIGHT_READERS
    for kind in type(module).__mro__:
        # A subclass with its own forward may call its modules, unless its forward calls super's.
        forward = vars(kind).get("forward")
        if inspect.isfunction(forward) and "super" not in forward.__code__.co_names:
            return kind is nn.MultiheadAttention
    return True
