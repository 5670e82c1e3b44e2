"""The result is written into out=, whatever memory it has. No gradient is recorded."""

from __future__ import annotations

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


PLACES = [contiguous, strided, odd_offset, the_input_itself, the_residual, overlapping_the_input]


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
    assert torch.equal(bits(out), expected)
    for name, tensor in tensors.items():
        if name not in ("x", "residual") or place in (contiguous, strided, odd_offset):
            assert torch.equal(tensor, before[name]), f"{name} was changed"


@pytest.mark.parametrize("impl", IMPLS)
def test_out_leaves_its_surroundings(impl: str) -> None:
    tensors = {name: t.requires_grad_(False) for name, t in CASE.tensors().items()}
    memory = torch.full((4, 11, CASE.width), 7.0)
    CASE.call(tensors, impl, out=memory[:, 1:10])
    assert (memory[:, 0] == 7).all()
    assert (memory[:, 10] == 7).all()


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
