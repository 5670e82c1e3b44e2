"""Whether a module of a model is called, or only its weights are read by the attention around it."""

from __future__ import annotations

import inspect

from torch import nn

READERS = ("WavLMAttention",)  # as nn.MultiheadAttention, they read the weights of the modules in them and call none


def is_called(model: nn.Module, path: str) -> bool:
    """Whether a module is called, and not only its weights read by the attention around it."""
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    return not any(map(_reads_weights, above))


def _reads_weights(module: nn.Module) -> bool:
    if not isinstance(module, nn.MultiheadAttention):
        return type(module).__name__ in READERS
    for kind in type(module).__mro__:  # a subclass with a forward of its own may call them, unless that calls super's
        forward = vars(kind).get("forward")
        if inspect.isfunction(forward) and "super" not in forward.__code__.co_names:
            return kind is nn.MultiheadAttention
    return True
