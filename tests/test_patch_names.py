"""Activations of other libraries that count as fused compute the same as the fused ones."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels.activations import FUSED
from compacter_kernels.patch.activation_names import fused_name, name_by_values

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    activations = pytest.importorskip("transformers.activations")

NAMED = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "quick_gelu": "quick_gelu",
    "leaky_relu": "leakyrelu",
    "linear": "identity",
    "mish": "mish",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "gelu_10": None,
    "laplace": None,
    "relu6": None,
    "prelu": None,
}
X = torch.linspace(-20, 20, 801, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMED)
def test_those_of_transformers(name: str) -> None:
    activation = activations.ACT2FN[name]
    assert fused_name(activation) == NAMED[name]
    if NAMED[name] is not None:
        torch.testing.assert_close(activation(X), FUSED[NAMED[name]].function(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "function",
    [F.relu, torch.relu, F.gelu, F.silu, F.tanh, torch.tanh, F.sigmoid, F.leaky_relu, F.mish, nn.GELU("tanh")],
)
def test_those_of_torch(function: Any) -> None:
    name = fused_name(function)
    assert name is not None
    torch.testing.assert_close(function(X), FUSED[name].function(X))


class _Shifted(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 1)


@pytest.mark.parametrize("other", [_Shifted(), nn.LeakyReLU(0.2), nn.Softplus(), F.elu, [].append])
def test_others_have_no_name(other: Any) -> None:
    assert fused_name(other) is None


def _clipped(x: Tensor) -> Tensor:
    return F.relu(x).clamp(max=30)


def _raising(x: Tensor) -> Tensor:
    raise ValueError


def test_formulas_that_are_name_by_values() -> None:
    assert name_by_values(lambda x: x * torch.sigmoid(x)) == "silu"
    assert (
        name_by_values(lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))))
        == "gelu_new"
    )
    for other in (
        _clipped,
        _raising,
        lambda x: x * 1.0001,
        lambda x: x[:2],
        lambda x: x.float(),
        nn.ReLU(),
        torch.relu,
    ):
        assert name_by_values(other) is None
