"""The activations between the down and the up projection.

The kernels compute those in the table `FUSED`; `code` is their number in `csrc/adapter.h`. The
plain-torch impls also take any callable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """An activation: its name, its code in the kernels (None: not fused) and its torch function."""

    name: str
    code: int | None
    function: Callable[[Tensor], Tensor]


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "mish": F.mish,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
FUSED = {name: Activation(name, code, function) for code, (name, function) in enumerate(_FUNCTIONS.items())}
_ALIASES = {
    "swish": "silu",
    "leaky_relu": "leakyrelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_orig": "gelu",
    "linear": "identity",
}


def resolve(activation: str | Callable[[Tensor], Tensor]) -> Activation:
    """The fused activation of a name, in any case, or a callable as one that is not fused.

    Raises:
        ValueError: the name is not in the table.
        TypeError: the argument is neither a name nor a callable.
    """
    if isinstance(activation, str):
        name = _ALIASES.get(activation.lower(), activation.lower())
        if name not in FUSED:
            raise ValueError(
                f"activation={activation!r} is not known; choose one of {', '.join(FUSED)}, or pass a callable"
            )
        return FUSED[name]
    if callable(activation):
        return Activation(getattr(activation, "__name__", type(activation).__name__), None, activation)
    raise TypeError(f"activation must be a name or a callable, got {type(activation).__name__}")
