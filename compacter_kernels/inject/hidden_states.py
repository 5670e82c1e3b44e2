"""The hidden states in the arguments and in the output of a module."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def first_argument(module: nn.Module) -> str:
    """The name of the first argument of a module's forward, "" if it has none."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The first argument of a call, also if passed by that name; TypeError if it is no tensor."""
    x = args[0] if args else kwargs.get(name)
    if not isinstance(x, Tensor):
        raise TypeError(
            f"an adapter takes the first argument of {type(module).__name__}.forward, {name}, which must be a "
            f"tensor; got {type(x).__name__}, of {len(args)} arguments by position and by name {sorted(kwargs)}"
        )
    return x


def map_first(change: Callable[[Tensor], Tensor], output: Any, module: nn.Module) -> Any:
    """The output of the module with `change` applied to it, or to the first of its tensors.

    TypeError: it is not a tensor, nor a tuple, list or dict that begins with one.
    """
    if isinstance(output, Tensor):
        return change(output)
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        first = output[0] if output else None
    if not isinstance(first, Tensor):
        raise TypeError(
            f"an adapter takes a tensor, or the first of a tuple, list or dict; {type(module).__name__} gave a "
            f"{type(output).__name__}{'' if first is output else f' that begins with {type(first).__name__}'}"
        )
    if isinstance(output, Mapping):
        return _like(output, {**output, next(iter(output)): change(first)})
    if hasattr(output, "_replace"):  # A named tuple.
        return output._replace(**{output._fields[0]: change(first)})
    return type(output)((change(first), *output[1:]))


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with `change` applied to its tensors, also to those in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _like(value, {key: map_tensors(change, item) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _like(mapping: Any, items: dict[str, Any]) -> Any:
    """A mapping of the same type. The outputs of transformers are also dataclasses."""
    if dataclasses.is_dataclass(type(mapping)):
        return dataclasses.replace(mapping, **items)
    changed = mapping.copy()
    changed.update(items)
    return changed
