"""The derivatives of the plain-torch impls against finite differences.

For factored this includes the second derivative.
"""

from __future__ import annotations

import pytest
import torch
from oracle import FP64, Case, Tensors
from torch import Tensor

CASES = [
    Case("linear", width=8, bottleneck=4, n=2, rank=2, shape=(3,)),
    Case("linear", width=4, bottleneck=8, n=2, shape=(3,), bias=False),
    Case("linear", width=6, bottleneck=9, n=3, rank=None, shape=(2,)),
    Case(width=6, bottleneck=4, n=2, shape=(3,)),
    Case(width=6, bottleneck=6, n=3, rank=2, up_n=2, up_rank=1, shape=(2,), residual="other", bias=False, scale=-0.5),
    Case(width=4, bottleneck=2, n=2, rank=None, shape=(2,), residual="none", activation="silu"),
]


def _names_and_leaves(case: Case) -> tuple[Tensors, tuple[Tensor, ...]]:
    tensors = case.tensors(FP64)
    return tensors, tuple(tensors.values())


@pytest.mark.parametrize("impl", ["dense", "factored"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case: Case, impl: str) -> None:
    tensors, leaves = _names_and_leaves(case)
    assert torch.autograd.gradcheck(lambda *ts: case.call(dict(zip(tensors, ts, strict=True)), impl), leaves)


@pytest.mark.parametrize("impl", ["dense", "factored"])
def test_gradcheck_of_a_learned_scale(impl: str) -> None:
    case = Case(width=6, bottleneck=4, n=2, shape=(3,))
    tensors, leaves = _names_and_leaves(case)
    scale = torch.tensor([0.7], dtype=FP64, requires_grad=True)

    def adapter(scale: Tensor, *ts: Tensor) -> Tensor:
        return case.call(dict(zip(tensors, ts, strict=True)), impl, scale=scale)

    assert torch.autograd.gradcheck(adapter, (scale, *leaves))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3]], ids=str)
def test_gradgradcheck_of_factored(case: Case) -> None:
    tensors, leaves = _names_and_leaves(case)
    assert torch.autograd.gradgradcheck(lambda *ts: case.call(dict(zip(tensors, ts, strict=True)), "factored"), leaves)
