"""Which fused activation a module or function of another library is."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels.activations import FUSED

_MODULES: dict[type, str] = {  # those of transformers come in when they are met
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Mish: "mish",
}
# By name, since transformers need not be installed; those of one name on the right differ by rounding alone.
_TRANSFORMERS_MODULES = {
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
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.leaky_relu: "leakyrelu",
    F.mish: "mish",
}


def fused_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name in `compacter_kernels.activations.FUSED` of the same function, or None where there is none.

    Told by its type alone, so that it may be asked in every call; a subclass is another function.
    """
    kind = type(activation)
    if kind in _MODULES:
        return _MODULES[kind]
    if isinstance(activation, nn.Module):
        if kind is nn.GELU:
            return "gelu" if activation.approximate == "none" else "gelu_new"
        if kind is nn.LeakyReLU:
            return "leakyrelu" if activation.negative_slope == 0.01 else None
        if kind.__module__ == "transformers.activations" and kind.__name__ in _TRANSFORMERS_MODULES:
            return _MODULES.setdefault(kind, _TRANSFORMERS_MODULES[kind.__name__])
        return None
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # a callable without a hash
        return None


def written_out(function: Callable[[Tensor], Tensor]) -> str | None:
    """The same for a Python function that writes out the formula, as `def swish(x): return x * torch.sigmoid(x)`.

    It is told by its values in float64, from which a formula that only rounds otherwise differs by some 1e-16.
    """
    if not isinstance(function, types.FunctionType):
        return None
    x = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    try:
        with torch.no_grad():
            values = function(x.clone())
    except Exception:  # anything may be wrong with a function of others; it is called as it is then
        return None
    if not isinstance(values, Tensor) or values.shape != x.shape or values.dtype != x.dtype:
        return None
    for name, activation in FUSED.items():
        if torch.allclose(values, activation.function(x), rtol=1e-12, atol=1e-12):
            return name
    return None
