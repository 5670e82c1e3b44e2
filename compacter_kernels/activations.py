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


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "mish": F.mish,
    "relu2": _relu2,
    "quick_gelu": _quick_gelu,
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
