"""Modes that take part in a call, and calls without the private names that report them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from oracle import FUSED, Case, assert_same_bits, run
from torch.fx.experimental.proxy_tensor import make_fx

from compacter_kernels import modes, private

NAMES = ("_len_torch_dispatch_stack", "_are_functorch_transforms_active")


def test_a_plain_call_is_alone() -> None:
    assert modes.alone()
    assert not modes.transformed()


def test_who_takes_part() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((modes.alone(), modes.transformed()))
        return x * 2

    x = torch.ones(3)
    make_fx(look)(x)
    torch.vmap(look)(x)
    with torch.autograd.forward_ad.dual_level():
        look(x)
    assert seen == [(False, False), (False, True), (False, True)]


@pytest.fixture(params=NAMES)
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A torch that lacks one of the private names."""
    with monkeypatch.context() as patch:
        patch.delattr(torch._C, request.param)
        importlib.reload(private)
    importlib.reload(modes)
    yield
    importlib.reload(private)
    importlib.reload(modes)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("impl", ["auto", "factored"])
@pytest.mark.parametrize("case", [Case("linear"), Case(residual="both")], ids=str)
def test_without_a_name_calls_are_right(case: Case, impl: str) -> None:
    assert not modes.alone()
    tensors = case.tensors()
    got, expected = run(case, tensors, impl), run(case, tensors, "dense")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", FUSED)
def test_operators_give_the_bits_of_the_direct_way(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(residual="both", shape=(7,))
    expected = run(case, case.tensors(), impl)
    monkeypatch.setattr(modes, "dispatch_modes", lambda: 1)
    assert not modes.alone()
    assert_same_bits(run(case, case.tensors(), impl), expected)
