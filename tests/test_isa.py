"""Every instruction set that this processor can run, and not only the chosen one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from oracle import BF16, FP16, FP32, Case, assert_same_bits, reference, run

_C = pytest.importorskip("compacter_kernels._C", reason="cpu is not built", exc_type=ImportError)

CASES = [
    Case(shape=(37,), width=768, bottleneck=24),
    Case(shape=(19,), width=772, bottleneck=20, residual="other", rank=2),
    Case(shape=(19,), width=96, bottleneck=24, n=12, dtype=BF16, activation="mish"),
    Case(shape=(5,), width=72, bottleneck=24, n=8, up_n=3, up_rank=2, dtype=FP16, activation="tanh", residual="none"),
    Case("linear", shape=(17,), width=30, bottleneck=42, n=6),
    Case("linear", shape=(1000,), width=24, bottleneck=48, n=3, rank=3, dtype=BF16, params=BF16),
]


@pytest.fixture
def given_back() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


@pytest.fixture(params=_C.build_info()["isa"])
def isa(request: pytest.FixtureRequest, given_back: None) -> str:
    try:
        _C.set_isa(request.param)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    return str(request.param)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agreement(case: Case, isa: str) -> None:
    assert _C.isa() == isa
    tensors = case.tensors()
    first = run(case, tensors, "cpu")
    reference(case).accept(first)
    assert_same_bits(run(case, tensors, "cpu"), first)


@pytest.mark.parametrize("dtypes", [(FP16, FP32), (FP32, FP16)], ids=["x", "parameters"])
def test_flush_denormal_changes_no_float16(dtypes: tuple[torch.dtype, torch.dtype], isa: str) -> None:
    """The subnormal numbers of float16 are normal ones of float32, which the kernels compute in."""
    case = Case("linear", dtype=dtypes[0], params=dtypes[1], shape=(17,), bias=False)
    tensors = case.tensors()
    with torch.no_grad():
        tensors["x" if dtypes[0] == FP16 else "down.left"].mul_(2.0**-17)
    expected = run(case, tensors, "cpu")
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("not on this processor")
        got = run(case, tensors, "cpu")
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, expected)


@pytest.mark.usefixtures("given_back")
def test_the_environment_chooses_or_the_widest() -> None:
    """`make instruction-sets` needs this."""
    chosen, widest = _C.isa(), ""
    for name in _C.build_info()["isa"]:  # from the narrowest
        with contextlib.suppress(ValueError):
            _C.set_isa(name)
            widest = name
    assert chosen == (os.environ.get("COMPACTER_KERNELS_ISA") or widest)


def test_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match='instruction set "mmx" is not supported here; choose one of'):
        _C.set_isa("mmx")
