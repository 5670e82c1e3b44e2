"""The activations of the Triton kernels, one number at a time, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from compacter_kernels.accuracy import error, floor
from compacter_kernels.activations import FUSED

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter (make interpret)", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from compacter_kernels.impl.triton.functions import activate, derivative  # noqa: E402

INF = float("inf")
COUNT = 4096


@triton.jit
def _apply(Y, H, D, COUNT: tl.constexpr, CODE: tl.constexpr):
    i = tl.arange(0, COUNT)
    y = tl.load(Y + i)
    tl.store(H + i, activate(y, CODE))
    tl.store(D + i, derivative(y, CODE))


def _ours(name: str, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h, d = torch.empty_like(y), torch.empty_like(y)
    _apply[(1,)](y, h, d, y.numel(), FUSED[name].code)
    return h, d


def _exact(name: str, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = y.to(torch.float64).requires_grad_()
    h = FUSED[name].function(y)
    return h.detach(), torch.autograd.grad(h.sum(), y)[0]


@pytest.mark.parametrize("reach", [20.0, 1.0, 1e-2, 1e-4, 1e-8, 1e-15])
@pytest.mark.parametrize("name", FUSED)
def test_value_and_derivative(name: str, reach: float) -> None:
    """Small numbers keep their digits: the error is relative to the largest one of the range."""
    y = torch.linspace(-reach, reach, COUNT)
    for ours, exact in zip(_ours(name, y), _exact(name, y), strict=True):
        assert error(ours, exact) <= floor(torch.float32, torch.float32)


@pytest.mark.parametrize("name", FUSED)
def test_nan_and_inf(name: str) -> None:
    h, _ = _ours(name, torch.tensor([float("nan"), INF, -INF, 0.0]))
    assert h[0].isnan()
    assert h[1] == (1.0 if name in ("tanh", "sigmoid") else INF)
    if name in ("tanh", "sigmoid", "relu", "leakyrelu", "relu2", "identity"):
        assert h[2] == _exact(name, torch.tensor([-INF]))[0][0]
    assert h[3] == _exact(name, torch.zeros(1))[0][0]
