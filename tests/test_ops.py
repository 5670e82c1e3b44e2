"""torch's checks of the operators that torch.compile and torch.export see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import BF16, FUSED, Case, Tensors, skip_if_refused, weights
from torch import Tensor

from compacter_kernels import ops  # noqa: F401  (registers the operators)

OPS = torch.ops.compacter_kernels
SIZES = [
    {"shape": (5,)},
    {"shape": (2, 3), "dtype": BF16, "bias": False},
    {"shape": (3,), "params": BF16, "rank": 2, "n": 3},
]


def _frozen(tensors: Tensors) -> Tensors:
    return {name: t.detach() for name, t in tensors.items()}


def _adapter_arguments(case: Case, tensors: Tensors, impl: str) -> tuple[Any, ...]:
    params = (*weights(tensors, "down."), *weights(tensors, "up."))
    return (tensors["x"], tensors.get("residual"), *params, case.residual == "x", "silu", 0.5, impl)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: str(Case(**s)))
def test_phm_linear(sizes: dict[str, Any], impl: str) -> None:
    case = Case("linear", **sizes)
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    torch.library.opcheck(OPS.phm_linear.default, (tensors["x"], *weights(tensors), impl))
    tensors = _frozen(tensors)
    arguments = (case.grad_output(), tensors["x"], *weights(tensors), impl)
    torch.library.opcheck(OPS.phm_linear_backward.default, arguments)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("residual", ["none", "x", "other"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: str(Case(**s)))
def test_adapter(sizes: dict[str, Any], residual: str, impl: str) -> None:
    case = Case(residual=residual, **sizes)
    tensors = case.tensors()
    skip_if_refused(case, tensors, impl)
    torch.library.opcheck(OPS.adapter.default, _adapter_arguments(case, tensors, impl))
    x, _, *rest = _adapter_arguments(case, _frozen(tensors), impl)
    torch.library.opcheck(OPS.adapter_backward.default, (case.grad_output(), x, *rest))


@pytest.mark.parametrize("impl", FUSED)
def test_strided_inputs(impl: str) -> None:
    case = Case("linear", shape=(4,))
    tensors = _frozen(case.tensors())
    x: Tensor = tensors["x"].repeat(2, 1)[::2].requires_grad_()
    left = tensors["down.left"].transpose(0, 1).contiguous().transpose(0, 1)
    arguments = (x, tensors["down.rule"], left, tensors["down.right"], tensors["down.bias"], impl)
    torch.library.opcheck(OPS.phm_linear.default, arguments)
