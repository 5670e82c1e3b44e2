"""Leading shapes of zero to three dimensions, and sizes that hypothesis draws."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from oracle import BF16, FP16, FP32, NOT_DENSE, Case, oracle, run

from compacter_kernels.activations import FUSED as ACTIVATIONS

SHAPES = [(), (1,), (7,), (0,), (2, 3), (3, 0, 2), (1, 1, 1), (2, 3, 4)]


@pytest.mark.parametrize("impl", NOT_DENSE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operation", ["linear", "adapter"])
def test_leading_shape(operation: str, shape: tuple[int, ...], impl: str) -> None:
    case = Case(operation, shape=shape, residual="other")
    tensors = case.tensors()
    out = case.call(tensors, impl)
    assert out.shape == case.grad_output().shape
    assert out.is_contiguous()
    oracle(case, tensors, case.grad_output()).accept(run(case, tensors, impl), impl)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, up_n = draw(st.integers(1, 12)), draw(st.sampled_from([None, 1, 2, 3, 4]))
    common = n if up_n is None else n * up_n
    return Case(
        draw(st.sampled_from(["linear", "adapter"])),
        width=common * draw(st.integers(1, 10)),
        bottleneck=common * draw(st.integers(1, 5)),
        n=n,
        rank=draw(st.integers(1, 4)),
        up_n=up_n,
        up_rank=draw(st.integers(1, 4)),
        shape=tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
        dtype=draw(st.sampled_from([FP32, BF16, FP16])),
        params=draw(st.sampled_from([FP32, BF16, FP16])),
        activation=draw(st.sampled_from([name for name in ACTIVATIONS if "relu" not in name])),
        residual=draw(st.sampled_from(["none", "x", "other"])),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.0, -2.5])),
    )


@pytest.mark.parametrize("impl", NOT_DENSE)
@settings(deadline=None, derandomize=True, max_examples=50, database=None)
@given(case=cases())
def test_any_size(impl: str, case: Case) -> None:
    tensors = case.tensors()
    oracle(case, tensors, case.grad_output()).accept(run(case, tensors, impl), impl)
