"""dense computes the formula of the paper.

The formula is written here again with torch.kron, without code of the library.
"""

from __future__ import annotations

import pytest
import torch
from oracle import BF16, FP16, FP32, FP64, Case, bits, weights
from torch import Tensor
from torch.nn import functional as F

import compacter_kernels as ck
from compacter_kernels.accuracy import error, floor

CASES = [
    Case("linear", n=1, rank=1, width=5, bottleneck=3),
    Case("linear", n=3, rank=2, width=30, bottleneck=9, bias=False),
    Case("linear", n=4, rank=None, width=24, bottleneck=8),
    Case("linear", n=12, rank=1, width=24, bottleneck=36),
]


def kron(weights: ck.PHMWeights) -> Tensor:
    """sum_i kron(A_i, s_i t_i)."""
    rule, left, right, _ = weights
    return sum(torch.kron(rule[i], left[i] if right is None else left[i] @ right[i]) for i in range(len(rule)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix_is_the_sum_of_kronecker_products(case: Case) -> None:
    w = weights(case.tensors(FP64))
    torch.testing.assert_close(ck.phm_matrix(w), kron(w), rtol=1e-14, atol=1e-14)
    assert ck.phm_matrix(w).is_contiguous()


@pytest.mark.parametrize("impl", ["dense", "factored"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(case: Case, impl: str) -> None:
    tensors = case.tensors(FP64)
    w = weights(tensors)
    expected = tensors["x"] @ kron(w) + (0 if w.bias is None else w.bias)
    torch.testing.assert_close(ck.phm_linear(tensors["x"], w, impl=impl), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", ["dense", "factored"])
def test_adapter(impl: str) -> None:
    case = Case(width=24, bottleneck=12, n=3, rank=2, up_n=6, up_rank=1, residual="other", scale=0.7)
    tensors = case.tensors(FP64)
    down, up = weights(tensors, "down."), weights(tensors, "up.")
    h = F.gelu(tensors["x"] @ kron(down) + down.bias, approximate="tanh")
    expected = 0.7 * (h @ kron(up) + up.bias) + tensors["residual"]
    torch.testing.assert_close(case.call(tensors, impl), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_dense_in_low_precision_rounds_once(dtype: torch.dtype) -> None:
    """The error of dense has its own limit, since the limits of all other impls depend on it."""
    case = Case(width=768, bottleneck=48, dtype=dtype, shape=(64,))
    tensors = case.tensors()
    exact = case.call({name: t.to(FP64) for name, t in tensors.items()}, "dense")
    assert error(case.call(tensors, "dense"), exact) <= floor(dtype, FP32)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [((FP16, FP16, FP16), FP32), ((BF16, FP32, FP16), FP32), ((FP32, FP64, FP32), FP64), ((FP64, BF16, BF16), FP64)],
    ids=["fp16", "mixed", "fp64 left", "fp64 rule"],
)
def test_matrix_is_never_below_float32(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    rule, left, right = (t.to(d) for t, d in zip(weights(Case("linear").tensors())[:3], dtypes, strict=True))
    assert ck.phm_matrix(ck.PHMWeights(rule, left, right)).dtype == expected


def test_matrix_keeps_its_precision_under_autocast() -> None:
    w = weights(Case("linear").tensors())
    expected = ck.phm_matrix(w)
    with torch.autocast("cpu", BF16):
        assert torch.equal(bits(ck.phm_matrix(w)), bits(expected))
