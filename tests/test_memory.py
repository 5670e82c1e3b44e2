"""The memory that the kernels read, write and keep.

They write every element of a result, change no input, and save nothing that grows with the tokens,
except x.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import (
    BF16,
    FP16,
    FP32,
    FUSED,
    IMPLS,
    Case,
    assert_same_bits,
    bits,
    copies,
    reference,
    run,
    skip_if_refused,
)  # fmt: skip
from torch import Tensor

CASES = [
    Case("linear", shape=(37,), width=30, bottleneck=42, n=6),
    Case(shape=(37,), width=30, bottleneck=18, n=6, rank=2, residual="other"),
    Case(shape=(37,), residual="x", dtype=BF16),
    Case(shape=(37,), residual="both"),
]


def test_uninitialised_memory_is_poisoned() -> None:
    """The fixture of conftest.py works.

    Otherwise the other tests would not detect elements that are never written.
    """
    x = torch.zeros(8)
    for empty in (torch.empty(8), torch.empty_like(x), x.new_empty(8), torch.empty(8, dtype=BF16)):
        assert empty.isnan().all()


@pytest.mark.failure("a kernel writes where it must not")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_bitwise_unchanged(case: Case, impl: str) -> None:
    tensors, grad = case.tensors(), case.grad_output()
    skip_if_refused(case, tensors, impl)
    before, grad_before = copies(tensors), grad.clone()
    run(case, tensors, impl, grad)
    assert_same_bits(tensors, before)
    assert torch.equal(grad, grad_before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_twice(case: Case, impl: str) -> None:
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    out = case.call(tensors, impl)
    first, second = (
        torch.autograd.grad(out, list(tensors.values()), case.grad_output(), retain_graph=True) for _ in range(2)
    )
    assert_same_bits(dict(zip(tensors, first, strict=True)), dict(zip(tensors, second, strict=True)))
    reference(case).accept({"out": out, **dict(zip(tensors, second, strict=True))}, impl)


def _saved(case: Case, tensors: dict[str, Tensor], impl: str, **options: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        found.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        case.call(tensors, impl, **options)
    return found


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_for_backward(case: Case, strided: bool, impl: str) -> None:
    """Only x and the parameters are saved: no bottleneck, and no copy of a strided x."""
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    if strided:
        x = torch.randn(2 * case.shape[0], case.width).to(case.dtype)[::2]
        tensors["x"] = x.requires_grad_()
    own = {(t.data_ptr(), t.stride()) for name, t in tensors.items() if name != "residual"}
    saved = _saved(case, tensors, impl)
    assert {(t.data_ptr(), t.stride()) for t in saved} == own


@pytest.mark.parametrize("impl", FUSED)
def test_saved_with_a_learned_scale(impl: str) -> None:
    """The scaled parameters are saved as well. Nothing but x grows with the token count."""
    case = Case(shape=(1000,), width=24, bottleneck=24)
    tensors = case.tensors()
    saved = _saved(case, tensors, impl, scale=torch.ones(1, requires_grad=True))
    assert [t.data_ptr() for t in saved if t.numel() >= 1000] == [tensors["x"].data_ptr()]


@pytest.mark.parametrize("impl", FUSED)
def test_nothing_is_saved_without_grad(impl: str) -> None:
    case = CASES[2]
    with torch.no_grad():
        assert not _saved(case, case.tensors(), impl)
    frozen = {name: t.requires_grad_(False) for name, t in case.tensors().items()}
    assert not _saved(case, frozen, impl)
    assert not case.call(frozen, impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_modes_without_grad_give_the_same_bits(dtype: torch.dtype, impl: str) -> None:
    case = Case(shape=(37,), dtype=dtype)
    tensors = case.tensors()
    expected = bits(case.call(tensors, impl))
    with torch.no_grad():
        assert torch.equal(bits(case.call(tensors, impl)), expected)
    with torch.inference_mode():
        assert torch.equal(bits(case.call(tensors, impl).clone()), expected)
