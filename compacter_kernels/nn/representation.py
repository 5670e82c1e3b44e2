"""The arguments of a constructor, read back from the module, for its repr."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


def arguments(module: nn.Module, *positional: str, names: dict[str, str], **values: Any) -> str:
    """The arguments of the constructor call that differ from their defaults.

    positional: attributes that are printed first, without a name. names: arguments that are printed
    as a bare name, like functions, because they have no literal. values: arguments whose value is
    not an attribute of the same name.
    """
    parts = [repr(getattr(module, name)) for name in positional]
    parameter = next(module.parameters())
    for name, spec in inspect.signature(type(module)).parameters.items():
        if name in positional:
            continue
        if name in names:
            parts.append(f"{name}={names[name]}")
        elif name == "device":
            if parameter.device.type != "cpu":
                parts.append(f"device={str(parameter.device)!r}")
        elif name == "dtype":
            if parameter.dtype != torch.get_default_dtype():
                parts.append(f"dtype={parameter.dtype}")
        elif name != "phm_rule":
            value = values[name] if name in values else getattr(module, name)
            if value != spec.default:
                text = getattr(value, "__name__", repr(value)) if callable(value) else repr(value)
                parts.append(f"{name}={text}")
    return ", ".join(parts)
