"""Strided, offset, transposed and expanded tensors.

The result is right, and no byte of the caller's memory changes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import BF16, IMPLS, Case, Tensors, bits, oracle, reference, run
from torch import Tensor

LINEAR = Case("linear", shape=(4, 3), width=24, bottleneck=20)
ADAPTER = Case(shape=(4, 3), residual="other", rank=2)
CASES = [
    LINEAR,
    ADAPTER,
    Case(shape=(4, 3)),
    Case(shape=(4, 3), residual="both"),
    Case(shape=(4, 3), residual="other", dtype=BF16, params=BF16),
]


def _inside(t: Tensor, larger: list[int], *index: slice) -> Tensor:
    """t as a view of a larger tensor, whose other elements are NaN."""
    view = t.new_full(larger, float("nan"))[index]
    return view.copy_(t.detach())


def columns(t: Tensor) -> Tensor:
    """Some columns of a wider tensor."""
    return _inside(t, [*t.shape[:-1], t.shape[-1] + 5], ..., slice(2, -3))


def every_second(t: Tensor) -> Tensor:
    """Every second element along the last and the first dimension."""
    return _inside(t, [2 * t.shape[0], *t.shape[1:-1], 2 * t.shape[-1]], slice(1, None, 2), ..., slice(None, None, 2))


def transposed(t: Tensor) -> Tensor:
    """A tensor whose last dimension does not have the smallest stride."""
    return t.detach().transpose(0, -1).contiguous().transpose(0, -1)


def odd_offset(t: Tensor) -> Tensor:
    """A contiguous tensor that begins one element after an aligned address."""
    return _inside(t.reshape(-1), [t.numel() + 2], slice(1, -1)).view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """The first row repeated with stride 0."""
    return t.detach()[:1].clone().expand(t.shape)


LAYOUTS = [columns, every_second, transposed, odd_offset, expanded]
Layout = Callable[[Tensor], Tensor]


def _check(case: Case, tensors: Tensors, grad: Tensor, impl: str) -> None:
    everything = {**tensors, "grad": grad}
    before = {name: bits(t._base if t._base is not None else t).clone() for name, t in everything.items()}
    got = run(case, tensors, impl, grad)
    oracle(case, tensors, grad).accept(got, impl)
    for name, t in everything.items():
        assert torch.equal(bits(t._base if t._base is not None else t), before[name]), f"{name} was changed"


def _with_layout(tensors: Tensors, layout: Layout, *names: str) -> Tensors:
    def laid_out(t: Tensor) -> Tensor:
        view = layout(t)
        assert layout is odd_offset or not view.is_contiguous() or t.shape[-1] == 1 or t.shape[0] == 1
        return view.requires_grad_()

    return {name: laid_out(t) if name in names and t.ndim > 1 else t for name, t in tensors.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs(case: Case, layout: Layout, impl: str) -> None:
    _check(case, _with_layout(case.tensors(), layout, "x", "residual"), case.grad_output(), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [LINEAR, ADAPTER], ids=str)
def test_parameters(case: Case, layout: Layout, impl: str) -> None:
    tensors = case.tensors()
    _check(case, _with_layout(tensors, layout, *(set(tensors) - {"x", "residual"})), case.grad_output(), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [LINEAR, ADAPTER, Case(shape=(4, 3), dtype=BF16)], ids=str)
def test_grad_output(case: Case, layout: Layout, impl: str) -> None:
    _check(case, case.tensors(), layout(case.grad_output()), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", [LINEAR, ADAPTER], ids=str)
def test_backward_of_a_sum(case: Case, impl: str) -> None:
    """The gradient of the output is one number, expanded to the whole shape."""
    tensors = case.tensors()
    case.call(tensors, impl).sum().backward()
    expected = oracle(case, tensors, torch.ones_like(case.grad_output()))
    assert not list(expected.violations({name: t.grad for name, t in tensors.items()}))


@pytest.mark.parametrize("impl", IMPLS)
def test_bias_as_a_column_of_a_matrix(impl: str) -> None:
    case = Case("linear")
    tensors = case.tensors()
    matrix = torch.full((case.bottleneck, 3), float("nan"))
    matrix[:, 1] = tensors["down.bias"].detach()
    got = run(case, {**tensors, "down.bias": matrix[:, 1].requires_grad_()}, impl)
    reference(case).accept(got, impl)
