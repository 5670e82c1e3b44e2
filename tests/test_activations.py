"""The activations: their names, their aliases, and the torch functions that they equal."""

from __future__ import annotations

import pytest
import torch
from oracle import FP64, FUSED, Case, copies, oracle, run
from torch import Tensor
from torch.nn import functional as F

from compacter_kernels.activations import FUSED as ACTIVATIONS, resolve

EXPECTED = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x * torch.sigmoid(x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "relu2": lambda x: torch.relu(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_function(name: str) -> None:
    x = torch.linspace(-9, 9, 1001, dtype=FP64)
    torch.testing.assert_close(ACTIVATIONS[name].function(x), EXPECTED[name](x), rtol=1e-12, atol=1e-12)


def test_every_activation_is_expected_and_has_a_code_of_its_own() -> None:
    assert list(ACTIVATIONS) == list(EXPECTED)
    assert [a.code for a in ACTIVATIONS.values()] == list(range(len(EXPECTED)))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("swish", "silu"),
        ("leaky_relu", "leakyrelu"),
        ("GELU", "gelu"),
        ("gelu_pytorch_tanh", "gelu_new"),
        ("ReLU", "relu"),
    ],
)
def test_alias(alias: str, name: str) -> None:
    assert resolve(alias) is ACTIVATIONS[name]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_from_zero(name: str, impl: str) -> None:
    """Values and slopes equal those of torch, also where an exponential overflows or vanishes."""
    case = Case(n=1, width=1, bottleneck=1, activation=name, residual="none", bias=False)
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 0.1, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 9.0, 20.0, 90.0, 1e4])
    x = torch.cat([sizes, -sizes])[:, None].requires_grad_()
    one = torch.ones(1, 1, 1)
    tensors = {"x": x, **{f"{side}.{field}": one for side in ("down", "up") for field in ("rule", "left", "right")}}
    grad = torch.ones_like(x)
    got = run(case, tensors, impl, grad)
    exact = run(case, copies(tensors, FP64), "dense", grad.to(FP64))
    for key in ("out", "x"):
        torch.testing.assert_close(got[key].to(FP64), exact[key], rtol=2e-6, atol=2e-7)


def _double(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize("impl", ["auto", "factored", "dense"])
def test_any_callable(impl: str) -> None:
    for activation in (_double, torch.nn.Softplus(), lambda x: x.clamp(-1, 1)):
        case = Case(activation=activation)
        tensors = case.tensors()
        oracle(case, tensors, case.grad_output()).accept(run(case, tensors, impl), impl)
