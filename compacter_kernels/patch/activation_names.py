"""The name of the fused activation that a module or a function of another library computes."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels.activations import FUSED

# The classes of torch and of transformers, which need not be installed, by their names. Classes of
# one line differ by rounding alone.
_CLASSES = {
    "identity": ("Identity", "LinearActivation"),
    "relu": ("ReLU",),
    "silu": ("SiLU", "SiLUActivation"),
    "tanh": ("Tanh",),
    "sigmoid": ("Sigmoid",),
    "mish": ("Mish", "MishActivation"),
    "gelu": ("GELUActivation",),
    "gelu_new": ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation", "PytorchGELUTanh", "GELUTanh"),
    "quick_gelu": ("QuickGELUActivation",),
    "relu2": ("ReLUSquaredActivation",),
}
_NAMES = {kind: name for name, kinds in _CLASSES.items() for kind in kinds}
_known: dict[type, str | None] = {}  # the classes that `fused_name` was asked for
_FUNCTIONS: dict[Any, str] = {activation.function: name for name, activation in FUSED.items()}
_FUNCTIONS |= {torch.relu: "relu", F.tanh: "tanh", F.sigmoid: "sigmoid"}


def fused_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name in `compacter_kernels.activations.FUSED` of the same function, or None without one.

    Every call may ask this, since only the type is looked at. A subclass is another function.
    """
    kind = type(activation)
    if kind in _known:
        return _known[kind]
    if isinstance(activation, nn.Module):
        if kind is nn.GELU:
            return "gelu" if activation.approximate == "none" else "gelu_new"
        if kind is nn.LeakyReLU:
            return "leakyrelu" if activation.negative_slope == 0.01 else None
        if kind.__module__.startswith(("torch.nn.modules.", "transformers.activations")):
            return _known.setdefault(kind, _NAMES.get(kind.__name__))
        return None
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # a callable without a hash
        return None


def name_by_values(function: Callable[[Tensor], Tensor]) -> str | None:
    """The same name for a Python function like `def swish(x): return x * torch.sigmoid(x)`.

    Its values in float64 decide. Two formulas of one function differ there by about 1e-16.
    """
    if isinstance(function, types.FunctionType):
        x = torch.linspace(-40, 40, 4001, dtype=torch.float64)
        with suppress(Exception), torch.no_grad():  # a function of another library may raise anything
            values = function(x.clone())
            for name, activation in FUSED.items():
                if values.shape == x.shape and torch.allclose(values, activation.function(x), rtol=1e-12, atol=1e-12):
                    return name
    return None
