"""x times a sum of Kronecker products of any shape: its gradients, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import BF16, FP16, FP32, FP64
from torch import Tensor

from compacter_kernels.accuracy import error, floor
from compacter_kernels.impl import chain as module
from compacter_kernels.impl.chain import chain
from compacter_kernels.saved import saved_bytes

# terms, (n_in, [s,] n_out), (in/n_in, [r,] out/n_out)
SHAPES: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = [
    (terms, rule, factor)
    for terms in (1, 3)
    for rule in ((4, 4), (6, 2), (1, 5), (5, 1), (6, 2, 9), (3, 1, 3), (2, 7, 2))
    for factor in ((5, 3), (1, 1), (16, 2, 12), (3, 1, 7), (2, 9, 2))
]


def _matrices(terms: int, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(terms, *pair, dtype=dtype).requires_grad_() for pair in pairwise(sizes)]


def _dense(
    x: Tensor, rules: Sequence[Tensor], factors: Sequence[Tensor], scale: float, base: Tensor | float = 0.0
) -> Tensor:
    """The same by its definition."""
    rule, factor = (side[0] if len(side) == 1 else side[0] @ side[1] for side in (rules, factors))
    return base + scale * x @ sum(torch.kron(a, w) for a, w in zip(rule, factor, strict=True))


def _draw(shape: tuple[int, Any, Any], dtype: torch.dtype = FP64) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    terms, rule, factor = shape
    x = torch.randn(2, 3, rule[0] * factor[0], dtype=dtype, requires_grad=True)
    return x, _matrices(terms, rule, dtype), _matrices(terms, factor, dtype)


@pytest.fixture(params=[True, False], ids=["one operation", "seen by torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a call, whatever takes part in it."""
    monkeypatch.setattr(module, "alone", lambda: request.param)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("based", [False, True], ids=["", "base"])
@pytest.mark.parametrize("wide", [1, 16], ids=["a product for each token", "one product"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape: Any, wide: int, based: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WIDE", wide)
    x, rules, factors = _draw(shape)
    inputs = [x, *rules, *factors]
    base: Any = None
    if based:  # with the tokens last in memory
        base = torch.randn(rules[-1].shape[2] * factors[-1].shape[2], 2, 3, dtype=FP64).permute(1, 2, 0)
        inputs.append(base.requires_grad_())
    y = chain(x, rules, factors, 0.7, base)
    exact = _dense(x, rules, factors, 0.7, 0.0 if base is None else base)
    assert y.is_contiguous()
    torch.testing.assert_close(y, exact)
    grad = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(exact, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("shape", [(2, (3, 2), (2, 1, 3)), (1, (2, 1, 3), (2, 2))], ids=str)
def test_second_derivatives(shape: Any) -> None:
    x, rules, factors = _draw(shape)

    def function(*tensors: Tensor) -> Tensor:
        return chain(tensors[0], tensors[1 : 1 + len(rules)], tensors[1 + len(rules) :], 2.0)

    assert torch.autograd.gradgradcheck(function, (x, *rules, *factors))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_order_has_the_fewest_multiplications(shape: Any) -> None:
    """Counted in each order of the sides, in another way."""
    _, rule, factor = shape

    def least(rule: tuple[int, ...], factor: tuple[int, ...]) -> float:
        if len(rule) == len(factor) == 1:
            return 0
        by_rule = rule[0] * rule[1] * factor[0] + least(rule[1:], factor) if len(rule) > 1 else math.inf
        by_factor = factor[0] * factor[1] * rule[0] + least(rule, factor[1:]) if len(factor) > 1 else math.inf
        return min(by_rule, by_factor)

    axes, total = [list(rule), list(factor)], 0
    for side in module._order(list(rule), list(factor)):
        total += axes[side][0] * axes[side][1] * axes[1 - side][0]
        del axes[side][0]
    assert total == least(rule, factor)


def test_two_factors_are_multiplied_first_where_that_is_less() -> None:
    wide, narrow = _matrices(1, (2, 8, 2), FP32), _matrices(1, (8, 2, 8), FP32)
    assert [m.shape for m in module.multiplied(wide, FP32)] == [(1, 2, 2)]
    assert module.multiplied(narrow, FP32) is narrow


@pytest.mark.parametrize("shape", [(1, (8, 8), (16, 2, 16)), (1, (8, 8), (16, 16)), (3, (8, 2, 8), (16, 16))], ids=str)
def test_only_the_inputs_are_kept(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "alone", lambda: True)
    x, rules, factors = _draw(shape, FP32)
    assert saved_bytes(lambda: chain(x, rules, factors), (x, *rules, *factors)) == 0
    strided = torch.randn(3, 2, x.shape[-1] * 2)[..., ::2].transpose(0, 1).requires_grad_()
    assert saved_bytes(lambda: chain(strided, rules, factors), (strided, *rules, *factors)) == 0
    y = chain(strided, rules, factors)
    torch.testing.assert_close(y, _dense(strided, rules, factors, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_x_of_low_precision(dtype: torch.dtype) -> None:
    """It computes in the dtype of the weights, under autocast too, and rounds the gradient of x."""
    x, rules, factors = _draw((2, (4, 6), (8, 3, 5)), FP32)
    low = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = chain(low, rules, factors)
    y.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (low, *rules, *factors)]
    reference = _dense(exact[0], exact[1:2], exact[2:], 1.0)
    reference.sum().backward()
    assert y.dtype == FP32
    assert error(y, reference.detach()) <= floor(FP32, FP32)
    for tensor, wide in zip((low, *rules, *factors), exact, strict=True):
        assert tensor.grad is not None and wide.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert error(tensor.grad, wide.grad) <= floor(tensor.dtype, FP32)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0, 3)])
def test_any_number_of_tokens(leading: tuple[int, ...]) -> None:
    _, rules, factors = _draw((2, (3, 4), (5, 1, 2)))
    x = torch.randn(*leading, 15, dtype=FP64, requires_grad=True)
    y = chain(x, rules, factors)
    torch.testing.assert_close(y, _dense(x, rules, factors, 1.0))
    grads = torch.autograd.grad(y.sum(), [x, *rules, *factors])
    expected = torch.autograd.grad(_dense(x, rules, factors, 1.0).sum(), [x, *rules, *factors])
    for got, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.usefixtures("_way")
def test_a_base_of_low_precision() -> None:
    """It is added in the dtype of the weights, and its gradient is rounded to its own."""
    x, rules, factors = _draw((1, (4, 6), (8, 3, 5)), FP32)
    base = torch.randn(2, 3, 30).to(BF16).requires_grad_()
    y = chain(x, rules, factors, 2.0, base)
    assert y.dtype == FP32
    torch.testing.assert_close(y, _dense(x, rules, factors, 2.0, base.float()), rtol=1e-5, atol=1e-4)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, [base], grad)
    assert torch.equal(got, grad.to(BF16))


def test_frozen_tensors_get_no_gradient() -> None:
    x, rules, factors = _draw((1, (4, 4), (6, 2, 6)))
    inputs = [x, *rules, *factors]
    exact = torch.autograd.grad(_dense(x, rules, factors, 1.0).sum(), inputs)
    for index, tensor in enumerate(inputs):
        for other in inputs:
            other.requires_grad_(other is tensor)
            other.grad = None
        chain(x, rules, factors).sum().backward()
        for other in inputs:
            assert (other.grad is not None) == (other is tensor)
        torch.testing.assert_close(tensor.grad, exact[index])


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
def test_transforms_and_forward_mode() -> None:
    x, rules, factors = _draw((2, (3, 2), (4, 1, 3)))
    x, rules, factors = x.detach(), [t.detach() for t in rules], [t.detach() for t in factors]

    def function(x: Tensor) -> Tensor:
        return chain(x, rules, factors)

    expected = _dense(x, rules, factors, 1.0)
    torch.testing.assert_close(torch.func.vmap(function)(x), expected)
    value, tangent = torch.func.jvp(function, (x,), (x,))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(tangent, expected)
    gradient = torch.func.grad(lambda x: function(x).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: _dense(x, rules, factors, 1.0).sum())(x))
