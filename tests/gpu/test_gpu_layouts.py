"""Strided, offset, transposed and expanded tensors on the device.

The call changes no byte of the caller's memory.
"""

from __future__ import annotations

import pytest
import test_strides as strides
import torch
from on_device import DEVICE, SERVING, inputs, moved
from oracle import BF16, Case, oracle

WIDE = Case(shape=(4, 3), width=768, bottleneck=24, dtype=BF16, residual="other")
CASES = [*strides.CASES, WIDE]


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("layout", strides.LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs(case: Case, layout: strides.Layout, impl: str) -> None:
    tensors, grad = inputs(case)
    strides._check(case, strides._with_layout(tensors, layout, "x", "residual"), grad, impl)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("layout", strides.LAYOUTS)
@pytest.mark.parametrize("case", [strides.LINEAR, strides.ADAPTER], ids=str)
def test_parameters(case: Case, layout: strides.Layout, impl: str) -> None:
    tensors, grad = inputs(case)
    names = set(tensors) - {"x", "residual"}
    strides._check(case, strides._with_layout(tensors, layout, *names), grad, impl)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("layout", strides.LAYOUTS)
@pytest.mark.parametrize("case", [strides.LINEAR, WIDE], ids=str)
def test_grad_output(case: Case, layout: strides.Layout, impl: str) -> None:
    tensors, grad = inputs(case)
    strides._check(case, tensors, layout(grad), impl)


@pytest.mark.parametrize("impl", SERVING)
@pytest.mark.parametrize("case", [strides.LINEAR, WIDE], ids=str)
def test_backward_of_a_sum(case: Case, impl: str) -> None:
    """The gradient of the output is one number, expanded to the whole shape."""
    tensors, grad = inputs(case)
    case.call(tensors, impl).sum().backward()
    expected = oracle(case, tensors, torch.ones_like(grad))
    assert not list(expected.violations({name: t.grad for name, t in tensors.items()}))


@pytest.mark.parametrize("impl", SERVING)
def test_bias_as_a_column_of_a_matrix(impl: str) -> None:
    case = Case("linear", width=768, bottleneck=24)
    tensors, grad = moved(case.tensors()), case.grad_output().to(DEVICE)
    matrix = torch.full((case.bottleneck, 3), float("nan"), device=DEVICE)
    matrix[:, 1] = tensors["down.bias"].detach()
    tensors["down.bias"] = matrix[:, 1].requires_grad_()
    strides._check(case, tensors, grad, impl)
