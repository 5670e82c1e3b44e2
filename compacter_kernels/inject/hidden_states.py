"""The hidden state in what a module takes and in what it gives: a tensor, or what begins with one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def first_parameter(module: nn.Module) -> str:
    """The name of the first argument that a module's forward takes."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The first argument of a call, also where it was passed by that name.

    Raises:
        TypeError: it is no tensor.
    """
    found = args[0] if args else kwargs.get(name)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"a parallel adapter takes the first argument of {type(module).__name__}.forward, {name}, which must be a "
            f"tensor; got {type(found).__name__}, of {len(args)} arguments by place and by name {sorted(kwargs)}"
        )
    return found


def first_output(module: nn.Module, output: Any) -> Tensor:
    """The tensor that an output is or begins with: the first of a tuple or list, the first value of a dict.

    Raises:
        TypeError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    found = output
    if isinstance(output, Mapping):
        found = next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        found = output[0] if output else None
    if not isinstance(found, Tensor):
        raise TypeError(
            f"an adapter takes a tensor, or the first of a tuple, list or dict; {type(module).__name__} gave a "
            f"{type(output).__name__}{'' if found is output else f' that begins with {type(found).__name__}'}"
        )
    return found


def with_output(output: Any, y: Tensor) -> Any:
    """The output with y in the place of its tensor; the output itself is left as it is."""
    if isinstance(output, Tensor):
        return y
    if isinstance(output, Mapping):
        first = {next(iter(output)): y}
        return _like(output, {**output, **first})
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: y})
    return type(output)((y, *output[1:]))


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with its tensors changed, those in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _like(value, {key: map_tensors(change, item) for key, item in value.items()})
    if isinstance(value, tuple | list):
        items = [map_tensors(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _like(mapping: Any, items: dict[str, Any]) -> Any:
    """A mapping of the same type; the outputs of transformers are dataclasses as well."""
    if dataclasses.is_dataclass(type(mapping)):
        return dataclasses.replace(mapping, **items)
    changed = mapping.copy()
    changed.update(items)
    return changed
