"""The name of the fused activation that a module or a function of another library computes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels.activations import FUSED

# The classes of torch and of transformers, which need not be installed, by their names. Classes of
# one name on the right differ by rounding alone.
_CLASSES = {
    "Identity": "identity",
    "ReLU": "relu",
    "SiLU": "silu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Mish": "mish",
    "LinearActivation": "identity",
    "SiLUActivation": "silu",
    "MishActivation": "mish",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "FastGELUActivation": "gelu_new",
    "AccurateGELUActivation": "gelu_new",
    "PytorchGELUTanh": "gelu_new",
    "GELUTanh": "gelu_new",
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu2",
}
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
            return _known.setdefault(kind, _CLASSES.get(kind.__name__))
        return None
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # a callable without a hash
        return None


def name_by_values(function: Callable[[Tensor], Tensor]) -> str | None:
    """The same name for a Python function like `def swish(x): return x * torch.sigmoid(x)`.

    Its values in float64 decide. Two formulas of one function differ there by about 1e-16.
    """
    if not isinstance(function, types.FunctionType):
        return None
    x = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    try:
        with torch.no_grad():
            values = function(x.clone())
    except Exception:  # the function of another library may raise anything; the adapter then calls it itself
        return None
    if not isinstance(values, Tensor) or values.shape != x.shape or values.dtype != x.dtype:
        return None
    for name, activation in FUSED.items():
        if torch.allclose(values, activation.function(x), rtol=1e-12, atol=1e-12):
            return name
    return None
