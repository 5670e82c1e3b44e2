"""The same bits in every run, and the same results with any number of threads."""

from __future__ import annotations

import pytest
import torch
from oracle import BF16, FUSED, IMPLS, Case, assert_same_bits, reference, run

CASES = [
    Case("linear", shape=(1000,), width=96, bottleneck=24, n=8),
    Case(shape=(1000,), width=96, bottleneck=24, n=12),
    Case(shape=(1000,), width=96, bottleneck=24, rank=2, dtype=BF16, residual="other"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_are_bitwise_equal(case: Case, impl: str) -> None:
    tensors = case.tensors()
    first = run(case, tensors, impl)
    for _ in range(20):
        assert_same_bits(run(case, tensors, impl), first)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads(case: Case, count: int, impl: str) -> None:
    torch.set_num_threads(count)
    tensors = case.tensors()
    first = run(case, tensors, impl)
    reference(case).accept(first)
    for _ in range(3):
        assert_same_bits(run(case, tensors, impl), first)
    few = Case(**{**vars(case), "shape": (2,)})  # fewer tokens than threads
    reference(few).accept(run(few, few.tensors(), impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_does_not_depend_on_its_neighbours(impl: str) -> None:
    """The results agree up to rounding.

    An impl may treat the last tokens of a block differently.
    """
    case = CASES[1]
    tensors = case.tensors()
    whole = case.call(tensors, impl)
    for start, stop in ((0, 1), (5, 8), (990, 1000)):
        part = case.call({**tensors, "x": tensors["x"][start:stop]}, impl)
        torch.testing.assert_close(part, whole[start:stop], rtol=1e-5, atol=1e-5)
