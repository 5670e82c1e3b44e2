"""The result is written into out=, whatever memory it has. No gradient is recorded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from oracle import BF16, FP32, IMPLS, Case, Tensors, bits, copies
from torch import Tensor

CASE = Case(shape=(4, 9), residual="other")


def contiguous(tensors: Tensors) -> Tensor:
    return torch.empty_like(tensors["x"])


def strided(tensors: Tensors) -> Tensor:
    shape = tensors["x"].shape
    return tensors["x"].new_zeros((*shape[:-1], 2 * shape[-1]))[..., ::2]


def odd_offset(tensors: Tensors) -> Tensor:
    x = tensors["x"]
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape)


def the_input_itself(tensors: Tensors) -> Tensor:
    return tensors["x"]


def the_residual(tensors: Tensors) -> Tensor:
    return tensors["residual"]


def overlapping_the_input(tensors: Tensors) -> Tensor:
    """An `out` that begins one row later in the memory of x."""
    x = tensors["x"]
    memory = x.new_zeros(x.numel() + x.shape[-1])
    tensors["x"] = memory[: x.numel()].view(x.shape).copy_(x)
    return memory[x.shape[-1] :].view(x.shape)


def overlapping_another_storage(tensors: Tensors) -> Tensor:
    """The same, where x and `out` have storages of their own over one array."""
    memory = (ctypes.c_char * (tensors["x"].nbytes + tensors["x"][0, 0].nbytes))()
    whole = {"dtype": tensors["x"].dtype, "count": tensors["x"].numel()}
    x = torch.frombuffer(memory, **whole).view(tensors["x"].shape)
    tensors["x"] = x.copy_(tensors["x"])
    return torch.frombuffer(memory, offset=x[0, 0].nbytes, **whole).view(x.shape)


def negated(tensors: Tensors) -> Tensor:
    return torch._neg_view(torch.empty_like(tensors["x"]))


PLACES = [contiguous, strided, odd_offset, the_input_itself, the_residual]
PLACES += [overlapping_the_input, overlapping_another_storage, negated]
APART = [contiguous, strided, odd_offset, negated]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_out(dtype: torch.dtype, place: Callable[[Tensors], Tensor], impl: str) -> None:
    case = Case(**{**vars(CASE), "dtype": dtype})
    with torch.no_grad():
        expected = bits(case.call(case.tensors(), impl))
        tensors = {name: t.requires_grad_(False) for name, t in case.tensors().items()}
        out = place(tensors)
        before = copies(tensors)
        assert case.call(tensors, impl, out=out) is out
    assert torch.equal(bits(out.resolve_neg()), expected)
    for name, tensor in tensors.items():
        if name not in ("x", "residual") or place in APART:
            assert torch.equal(tensor, before[name]), f"{name} was changed"


@pytest.mark.parametrize("impl", IMPLS)
def test_out_leaves_its_surroundings(impl: str) -> None:
    tensors = {name: t.requires_grad_(False) for name, t in CASE.tensors().items()}
    memory = torch.full((4, 11, CASE.width), 7.0)
    CASE.call(tensors, impl, out=memory[:, 1:10])
    assert (memory[:, 0] == 7).all()
    assert (memory[:, 10] == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_out_that_a_backward_needs_is_an_error(impl: str) -> None:
    """As for every tensor that is changed in place."""
    tensors, factor = CASE.tensors(), torch.ones(1, requires_grad=True)
    out = torch.empty_like(tensors["x"])
    product = (factor * out).sum()
    with torch.no_grad():
        CASE.call(tensors, impl, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_out_with_grad_is_refused(impl: str) -> None:
    tensors = CASE.tensors()
    with pytest.raises(ValueError, match=r"out= records no gradient.*no_grad"):
        CASE.call(tensors, impl, out=torch.empty_like(tensors["x"]))


@pytest.mark.parametrize("impl", IMPLS)
def test_out_of_no_tokens(impl: str) -> None:
    case = Case(shape=(0,))
    with torch.no_grad():
        out = torch.empty(0, case.width)
        assert case.call(case.tensors(), impl, out=out) is out
